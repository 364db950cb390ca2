"""What is generated and committed is what its generator writes today."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import Any

from docs import make_configuration, make_detection, make_metrics, make_verdicts
from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.commands.replay import replay
from foreshock_collector.config import Config
from tests.support.repository import ROOT


def test_the_page_of_series_is_what_the_catalogue_says() -> None:
    assert make_metrics.PAGE.read_text(encoding="utf-8") == make_metrics.page(), "run: make docs"


def test_the_tables_of_verdicts_are_what_the_verdict_table_says() -> None:
    assert make_verdicts.PAGE.read_text(encoding="utf-8") == make_verdicts.page(), "run: make docs"


def test_the_page_of_settings_is_what_the_settings_say() -> None:
    assert make_configuration.PAGE.read_text(encoding="utf-8") == make_configuration.page(), "run: make docs"


def test_the_picture_of_the_rules_is_what_they_decide() -> None:
    assert make_detection.PICTURE.read_text(encoding="utf-8") == make_detection.picture(), "run: make docs"
    found = {case.title: replay(case.rows()) for case in make_detection.cases()}
    alerts = {title: any(event.kind == "build_up" for event in each.events) for title, each in found.items()}
    assert alerts == {
        "A climb after a long decay": True,
        "A lone spike": False,
        "Two equally hard batches": False,
        "A learning rate that runs away": True,
        "Dead after the first updates, and finite": True,
        "A loss that climbs at a flat norm": False,
    }
    assert found["A loss that climbs at a flat norm"].verdict.cause == "loss_divergence"


def test_every_variable_that_is_read_and_every_setting_has_its_line() -> None:
    page = make_configuration.page()
    sources = [path for folder in ("agent", "collector") for path in (ROOT / folder).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"FORESHOCK_[A-Z_]*[A-Z]\b", path.read_text("utf-8"))}
    assert len(named) > 10
    settings = {f"FORESHOCK_COLLECTOR_{field.name.upper()}" for field in fields(Config) if field.name != "runs"}
    for name in sorted(named | settings):
        assert f"`{name}`" in page, f"{name} stands in no line"
    for name in rules(DEFAULT):
        (line,) = (line for line in page.splitlines() if re.match(rf"\| `(faults\.)?{name}` \|", line))
        assert not line.endswith("|  |"), f"{name} has no meaning"


def rules(group: Any) -> list[str]:
    values = {field.name: getattr(group, field.name) for field in fields(group)}
    return [name for key, value in values.items() for name in (rules(value) if is_dataclass(value) else [key])]
