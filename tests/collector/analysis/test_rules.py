"""Rules have their ranges: what lies beyond is refused in one line, what lies within keeps the collector alive."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.commands.cli import collector, diagnose
from foreshock_collector.commands.logs import Row
from foreshock_collector.commands.replay import replay


def numbers(group: Any = DEFAULT, path: str = "") -> Iterator[tuple[str, float, float, float]]:
    """Name, default and range of each number among the rules."""
    for rule in fields(group):
        value = getattr(group, rule.name)
        if is_dataclass(value):
            yield from numbers(value, f"{path}{rule.name}.")
        elif not isinstance(value, bool):
            yield f"{path}{rule.name}", value, *rule.metadata["range"]


NUMBERS = [pytest.param(*number, id=number[0]) for number in numbers()]


def changed(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def eventful() -> list[Row]:
    """Calm, a climb, NaN, a recovery, losses of zero, a rate that jumps, a norm that fades."""
    rng = random.Random(0)
    calm = [(math.exp(rng.gauss(0, 0.1)), 2.0, 0.1) for _ in range(60)]
    climb = [(3.0**i, 2.0 + i, 0.1) for i in range(8)]
    rest = [(1e-7 if i > 60 else 1.0, 0.0 if i % 2 else 5.0, 0.1 if i % 50 else 1e-9) for i in range(260)]
    told = [*calm, *climb, (math.nan, math.nan, 0.1), *rest, (math.inf, 2.0, 0.1)]
    return [Row(step=step, norm=norm, loss=loss, rate=rate) for step, (norm, loss, rate) in enumerate(told)]


@pytest.mark.parametrize(("name", "default", "least", "most"), NUMBERS)
def test_a_rule_may_be_anything_in_its_range_and_nothing_beyond(
    name: str, default: float, least: float, most: float
) -> None:
    assert least <= default <= most
    for value in (least, most):
        assert replay(eventful(), DEFAULT.with_overrides(changed(name, value))).log
    beyond: tuple[Any, ...] = (math.nextafter(least, -math.inf), math.nextafter(most, math.inf))
    for value in (*beyond, math.nan, math.inf, True, "1"):
        with pytest.raises(ValueError, match=f"rule {name} must be a .*number from .* to .*, not "):
            DEFAULT.with_overrides(changed(name, value))


@pytest.mark.parametrize("rule", ["gradient.alpha=1", "gradient.surge_steps=0", "planned_rate_change=0"])
def test_a_rule_beyond_its_range_is_one_line_for_diagnose_and_for_the_collector(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str
) -> None:
    name, _, number = rule.partition("=")
    assert diagnose(["--set", rule, "log.csv"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"foreshock diagnose: rule {name} must be a")
    group, _, rule = name.rpartition(".")
    settings = tmp_path / "collector.toml"
    settings.write_text(f'[runs."*"{"." + group if group else ""}]\n{rule} = {number}\n')
    assert collector(["--config", str(settings)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"foreshock collector: runs.*: rule {name} must be a")
