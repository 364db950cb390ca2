"""`foreshock doctor collector`: what each check finds, and what it advises."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from foreshock_collector.alerting.alerts import ALERTS
from foreshock_collector.commands.doctor import machine, service
from foreshock_collector.commands.doctor.checks import checks
from foreshock_collector.commands.doctor.prometheus import alertmanagers, prometheus, rules, scraping
from foreshock_collector.config import Config
from foreshock_collector.notify.run_alerts import duration
from foreshock_collector.state.store import Store
from foreshock_recorder.doctor.finding import Finding, Level
from tests.support.waiting import free_port

HERE = version("foreshock")


def is_as(found: Finding, level: Level, text: str) -> bool:
    """Whether a finding says this, with advice unless all is well."""
    return found.level is level and text in found.text and bool(found.advice) == (level is not Level.OK)


class Collector(BaseHTTPRequestHandler):
    """Answers as a collector does."""

    answers: dict[str, tuple[int, str]]

    def do_GET(self) -> None:
        status, text = self.answers.get(self.path, (404, "not found"))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """Settings of a collector that answers."""
    monkeypatch.delenv("FORESHOCK_URL", raising=False)
    build = f'foreshock_build_info{{python="3.11",version="{HERE}"}} 1\n'
    monkeypatch.setattr(
        Collector, "answers", {"/-/ready": (200, "ready\n"), "/metrics": (200, build)}, raising=False
    )  # fmt: skip
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        yield Config(http_port=port, grpc_port=port, database=str(tmp_path / "foreshock.db"))
        server.shutdown()


@pytest.mark.integration
def test_a_collector_that_answers_is_found(config: Config) -> None:
    answers, page = service.page(config)
    assert answers and is_as(page, Level.OK, "is ready, from this machine only")
    assert is_as(service.records(config), Level.OK, f"127.0.0.1:{config.grpc_port} accepts connections")
    assert is_as(service.version(config), Level.OK, HERE)


@pytest.mark.integration
def test_a_collector_that_cannot_store_or_is_older_is_found(config: Config) -> None:
    Collector.answers["/-/ready"] = (503, "not ready: cannot commit, see the log\n")
    answers, page = service.page(config)
    assert answers and is_as(page, Level.FAIL, "cannot commit")
    Collector.answers["/metrics"] = (200, 'foreshock_build_info{python="3.11",version="0.0.1"} 1\n')
    assert is_as(service.version(config), Level.WARN, "the collector is 0.0.1")
    Collector.answers["/metrics"] = (200, "up 1\n")
    assert is_as(service.version(config), Level.FAIL, "is not a collector's")
    Collector.answers["/metrics"] = (401, "a token is required")
    assert is_as(service.version(config), Level.WARN, "401")
    assert "FORESHOCK_TOKEN_FILE" in service.version(config).advice


@pytest.mark.integration
def test_a_collector_that_is_not_there_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORESHOCK_URL", raising=False)
    config = Config(http_port=free_port(), grpc_port=free_port())
    answers, page = service.page(config)
    assert not answers and is_as(page, Level.FAIL, "does not answer")
    assert is_as(service.records(config), Level.FAIL, "accepts no connections")
    monkeypatch.setenv("FORESHOCK_URL", "monitor:9327")
    answers, page = service.page(config)
    assert not answers and is_as(page, Level.FAIL, "monitor:9327 is not an HTTP address")


def test_the_address_follows_from_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORESHOCK_URL", raising=False)
    assert service.url_of(Config(host="::1", http_port=1)) == "http://[::1]:1"
    assert service.url_of(Config(host="monitor", http_port=1, tokens="t", tls_certificate="c", tls_key="k")) == (
        "https://monitor:1"
    )
    monkeypatch.setenv("FORESHOCK_URL", "https://other/")
    assert service.url_of(Config()) == "https://other"


def test_a_database_is_described_by_its_state(tmp_path: Path) -> None:
    path = tmp_path / "foreshock.db"
    assert is_as(machine.database(path, answers=False), Level.OK, "will be made")
    assert is_as(machine.database(path, answers=True), Level.WARN, "the collector has another one")
    store = Store(path)
    assert is_as(machine.database(path, answers=True), Level.OK, "MB, in use by the collector")
    assert is_as(machine.database(path, answers=False), Level.FAIL, "its collector does not answer")
    store.close()
    assert is_as(machine.database(path, answers=True), Level.WARN, "is not in use")
    assert machine.database(path, answers=False).text == f"{path}, {path.stat().st_size / 1e6:,.1f} MB"
    # The check has let go of it.
    Store(path).close()


def test_a_file_that_is_no_database_of_a_collector_is_named(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.write_text("no database, and long enough for a header of SQLite's" * 10)
    assert is_as(machine.database(notes, answers=False), Level.FAIL, "cannot be read: file is not a database")
    assert is_as(machine.database(tmp_path, answers=False), Level.FAIL, "is not a file that can be written")
    assert is_as(machine.database(tmp_path / "none" / "db", answers=False), Level.FAIL, "there is no folder")
    assert is_as(machine.disk(tmp_path / "none" / "db", 1.0), Level.FAIL, "there is no folder")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The superuser may write everywhere.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    assert is_as(machine.database(tmp_path / "db", answers=False), Level.FAIL, f"{tmp_path} is not writable")


@pytest.mark.parametrize(
    ("free", "growth", "level", "text"),
    [
        (5e9, 4e9, Level.OK, "5.0 GB free"),
        (3e9, 4e9, Level.WARN, "may grow by 4.0 GB"),
        (3e9, -1e9, Level.OK, "3.0 GB free"),
        (9e7, -1e9, Level.FAIL, "0.1 GB free"),
    ],
)
def test_a_database_needs_room(free: float, growth: float, level: Level, text: str) -> None:
    assert is_as(machine.room(free, growth), level, text)


@pytest.mark.parametrize(
    ("settings", "environment", "level", "text"),
    [
        ({}, {}, Level.OK, "none"),
        ({}, {"https_proxy": "http://p"}, Level.OK, "https_proxy is ignored"),
        ({"notify_url": "http://hooks/x"}, {"HTTP_PROXY": "http://p"}, Level.WARN, "notifications ignore HTTP_PROXY"),
        ({"otlp_endpoint": "http://otel:4318/v1/metrics"}, {"http_proxy": "http://p"}, Level.WARN, "OTLP go through"),
        (
            {"otlp_endpoint": "http://otel:4318/v1/metrics"},
            {"http_proxy": "http://p", "no_proxy": "otel"},
            Level.OK,
            "ignored",
        ),
    ],
)
def test_a_proxy_is_named(
    settings: dict[str, str],
    environment: dict[str, str],
    level: Level,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_as(machine.proxy(Config(**settings), environment), level, text)  # type: ignore[arg-type]


def test_settings_that_would_not_start_end_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "collector.toml"
    file.write_text("http_prt = 1\n")
    *_, last = checks(str(file), "")
    assert last.check == "settings" and is_as(last, Level.FAIL, "http_prt")
    (found,) = machine.settings({"FORESHOCK_COLLECTOR_DATABSE": "x"})
    assert is_as(found, Level.WARN, "FORESHOCK_COLLECTOR_DATABASE")


def test_whom_a_collector_notifies_is_said_without_the_address(tmp_path: Path) -> None:
    assert is_as(service.notifications(Config()), Level.OK, "none")
    config = Config(notify_url="https://hooks.example/secret", notify_secret=str(tmp_path / "none"))
    assert is_as(service.notifications(config), Level.FAIL, "cannot be read")
    config = Config(notify_url="https://hooks.example/secret")
    assert is_as(service.notifications(config), Level.OK, "go to hooks.example;")


def target(address: str, health: str = "up", job: str = "foreshock") -> dict[str, Any]:
    """A target as Prometheus tells it."""
    error = "connection refused" if health == "down" else ""
    return {
        "scrapeUrl": f"http://{address}/metrics", "health": health, "lastError": error, "scrapeInterval": "5s",
        "labels": {"job": job},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "level", "text"),
    [
        ([], Level.FAIL, "none of its 0 targets"),
        ([target("node:9100", job="node")], Level.FAIL, "none of its 1 targets"),
        ([target("127.0.0.1:9327", job="other")], Level.OK, "scrapes http://127.0.0.1:9327/metrics every 5s"),
        # Another collector that is down says nothing of this one.
        ([target("other:9327", "down"), target("127.0.0.1:9327")], Level.OK, "127.0.0.1"),
        # A name that only Prometheus knows.
        ([target("10.0.0.7:9327")], Level.OK, "10.0.0.7"),
        ([target("10.0.0.7:9327", "down")], Level.FAIL, "connection refused"),
        ([target("127.0.0.1:9327", "unknown")], Level.WARN, "not scraped"),
    ],
)
def test_the_collector_is_found_among_the_targets(targets: list[dict[str, Any]], level: Level, text: str) -> None:
    assert is_as(scraping(targets, hosts={"127.0.0.1", "monitor"}, port=9327), level, text)


def loaded() -> list[dict[str, Any]]:
    """The shipped rules as Prometheus tells them, and a stranger's."""
    ours = [
        {
            "name": alert.name,
            "query": alert.expr.replace("\n", " "),
            "duration": duration(alert.wait),
            "keepFiringFor": duration(alert.keep_firing_for),
            "health": "ok",
        }
        for alert in ALERTS
    ]
    return [*ours, {"name": "NodeDown", "query": "up == 0", "duration": 0, "health": "err"}]


def test_the_shipped_rules_are_those_of_this_release() -> None:
    assert is_as(rules(loaded()), Level.OK, f"{len(ALERTS)} alerts, as in foreshock {HERE}")


@pytest.mark.parametrize("change", [{"query": "vector(1)"}, {"duration": 7}, {"keepFiringFor": 7}])
def test_a_rule_that_fires_otherwise_is_named(change: dict[str, Any]) -> None:
    first, *others = loaded()
    assert is_as(rules([first | change, *others]), Level.WARN, f"{first['name']} not as in foreshock {HERE}")


def test_rules_that_are_missing_fail_or_are_of_another_release_are_named() -> None:
    assert is_as(rules(loaded()[-1:]), Level.FAIL, "not loaded")
    missing = rules(loaded()[5:])
    assert is_as(missing, Level.FAIL, f"and 2 more of {len(ALERTS)} not loaded") and ALERTS[0].name in missing.text
    first, *others = loaded()
    broken = first | {"health": "err", "lastError": "found duplicate series"}
    assert is_as(rules([broken, *others]), Level.FAIL, f"{first['name']} fails: found duplicate series")
    old = first | {"name": "ForeshockOfYore"}
    assert is_as(rules([old, *loaded()]), Level.WARN, "ForeshockOfYore not as in")


@pytest.mark.integration
def test_an_alertmanager_is_asked_whether_it_is_ready(config: Config) -> None:
    (none,) = alertmanagers([], notifies=False)
    assert is_as(none, Level.WARN, "alerts are not sent")
    (instead,) = alertmanagers([], notifies=True)
    assert is_as(instead, Level.OK, "the collector notifies")
    known = [{"url": f"http://127.0.0.1:{port}/api/v2/alerts"} for port in (config.http_port, free_port())]
    first, second = alertmanagers(known, notifies=False)
    assert is_as(first, Level.OK, f"http://127.0.0.1:{config.http_port} is ready")
    assert is_as(second, Level.WARN, "does not answer from here")


@pytest.mark.integration
@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("monitor:9090", "is not an HTTP address"),
        ("http://127.0.0.1:{free}", "Connection refused"),
        ("http://127.0.0.1:{collector}", "404"),
    ],
)
def test_what_does_not_answer_as_prometheus_does_is_named(url: str, text: str, config: Config) -> None:
    address = url.format(free=free_port(), collector=config.http_port)
    (found,) = prometheus(address, config)
    assert found.check == "prometheus" and is_as(found, Level.FAIL, text)


def test_without_an_address_prometheus_is_not_checked() -> None:
    (found,) = prometheus("", Config())
    assert is_as(found, Level.WARN, "not checked") and "--prometheus-url" in found.advice
