"""`foreshock doctor collector` beside a real collector, Prometheus and Alertmanager."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from foreshock_collector.commands.doctor.checks import checks
from foreshock_collector.commands.doctor.prometheus import prometheus
from foreshock_collector.config import Config
from foreshock_recorder.doctor.command import main
from foreshock_recorder.doctor.finding import Level
from tests.support.alerted_collector import Watch
from tests.support.alerting import programs, start_prometheus
from tests.support.waiting import eventually


def test_a_collector_that_is_watched_is_well(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "HTTP_PORT": str(urlsplit(watch.collector.url).port),
        "GRPC_PORT": watch.collector.address.rpartition(":")[2],
        "DATABASE": str(watch.collector.database),
    }.items():
        monkeypatch.setenv(f"FORESHOCK_COLLECTOR_{name}", value)
    monkeypatch.setenv("FORESHOCK_URL", watch.collector.url)
    url = f"http://{watch.prometheus}"
    found = eventually(
        lambda: (seen := list(checks("", url))) and all(each.level is Level.OK for each in seen) and seen,
        "a Prometheus that has scraped",
    )
    assert [each.check for each in found] == [
        "versions", "settings", "proxy", "page", "records", "running", "database", "disk", "notifications",
        "prometheus", "rules", "alertmanager", "clock",
    ]  # fmt: skip
    texts = {each.check: each.text for each in found}
    assert texts["database"].endswith("in use by the collector")
    assert texts["prometheus"] == f"scrapes {watch.collector.url}/metrics every 1s"
    assert main(["collector", "--prometheus-url", url, "--json"]) == 0
    assert [json.loads(line)["check"] for line in capsys.readouterr().out.splitlines()] == list(texts)


def test_a_prometheus_without_target_rules_and_alertmanager_is_found(tmp_path: Path) -> None:
    (tmp_path / "prometheus.yml").write_text("global: {scrape_interval: 1s}\n")
    with programs() as start:
        address = start_prometheus(start, tmp_path / "prometheus.yml", tmp_path)
        found = list(prometheus(f"http://{address}", Config()))
    assert {each.check: each.level for each in found} == {
        "prometheus": Level.FAIL, "rules": Level.FAIL, "alertmanager": Level.WARN, "clock": Level.OK,
    }  # fmt: skip
