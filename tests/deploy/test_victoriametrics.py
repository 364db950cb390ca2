"""Two collectors, the shipped Prometheus with remote write, and a VictoriaMetrics that has the series of both."""

from __future__ import annotations

import asyncio
import math
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from foreshock_protos import DEFAULT_HTTP_PORT
from grafana.make import dashboards
from tests.grafana.linting import filled
from tests.support.alerting import ALERTS, RULES, programs, request, start_prometheus
from tests.support.collector_process import Collector
from tests.support.repository import ROOT
from tests.support.streams import Stream, hello, steps
from tests.support.waiting import eventually, free_port

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("victoria-metrics") is None, reason="victoria-metrics is not installed"),
]
CONFIGS = ROOT / "deploy/victoriametrics"
CALM, EXPLODED = "calm", "exploded"


def ask(address: str, expr: str) -> list[dict[str, Any]]:
    path = f"/api/v1/query?{urlencode({'query': expr})}"
    answer: list[dict[str, Any]] = request(address, "GET", path)["data"]["result"]
    return answer


def about(found: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    series = [each["metric"] for each in found]
    return {(each.get("instance", ""), each.get("experiment", ""), each.get("run", "")) for each in series}


def start_victoriametrics(folder: Path, stack: ExitStack) -> str:
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        ["victoria-metrics", f"-httpListenAddr={address}", f"-storageDataPath={folder / 'store'}",
         "-retentionPeriod=12", "-search.latencyOffset=1ms"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    stack.callback(process.wait, timeout=30)
    stack.callback(process.terminate)

    def listens() -> bool:
        with suppress(URLError), urlopen(f"http://{address}/health", timeout=30):
            return True
        return False

    eventually(listens, "a VictoriaMetrics that listens")
    return address


def with_addresses(folder: Path, collectors: list[str], store: str) -> Path:
    """The shipped configuration, every second and pointed at this test's processes."""
    config = yaml.safe_load((CONFIGS / "prometheus-remote-write.yml").read_text())
    assert config["rule_files"] == [RULES.name]
    shutil.copy(RULES, folder)
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    ((scraped,), (remote,)) = config["scrape_configs"], config["remote_write"]
    scraped["static_configs"][0]["targets"] = collectors
    remote["url"] = f"http://{store}/api/v1/write"
    remote["queue_config"]["batch_send_deadline"] = "1s"
    del config["alerting"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    return folder / "prometheus.yml"


async def feed(collector: Collector, run: str) -> None:
    stream = Stream(collector)
    norms = [1.0 + 0.01 * (step % 7) for step in range(60)]
    if run == EXPLODED:
        norms += [3.0**step for step in range(1, 12)] + [math.nan]
    await stream.send(hello(run), steps(1, norms, run=run))
    await stream.stored(len(norms))
    await stream.close()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Addresses of a Prometheus that scrapes two collectors with a run each, and of the store that it writes to."""
    folder = tmp_path_factory.mktemp("both")
    with ExitStack() as stack:
        collectors = []
        for run in (CALM, EXPLODED):
            (folder / run).mkdir()
            collectors.append(Collector(folder / run))
            stack.callback(collectors[-1].stop)
            asyncio.run(feed(collectors[-1], run))
        store = start_victoriametrics(folder, stack)
        targets = [collector.url.removeprefix("http://") for collector in collectors]
        prometheus = start_prometheus(stack.enter_context(programs()), with_addresses(folder, targets, store), folder)
        eventually(lambda: len(ask(store, "foreshock_steps_total")) == 2, "the series of both collectors")
        eventually(lambda: ask(store, 'ALERTS{alertname="ForeshockExplodingGradients"}'), "an alert's own series")
        yield prometheus, store


def test_the_series_of_two_collectors_are_in_one_place_each_with_its_collector(both: tuple[str, str]) -> None:
    found = about(ask(both[1], "foreshock_steps_total"))
    assert {run for _, _, run in found} == {CALM, EXPLODED}
    assert len({instance for instance, _, _ in found}) == 2
    (incident,) = ask(both[1], "foreshock_incident_info")
    assert (incident["metric"]["run"], incident["metric"]["verdict"]) == (EXPLODED, "exploding_gradients")


def test_the_store_takes_every_query_of_the_dashboards(both: tuple[str, str]) -> None:
    asked = 0
    for text in dashboards().values():
        for panel in yaml.safe_load(text)["panels"]:
            for target in panel.get("targets", ()):
                ask(both[1], filled(target["expr"], interval="30s"))
                asked += 1
    assert asked > 30


@pytest.mark.parametrize("alert", ALERTS, ids=[alert["alert"] for alert in ALERTS])
def test_a_rule_is_true_in_the_store_where_it_is_in_prometheus(alert: dict[str, Any], both: tuple[str, str]) -> None:
    prometheus, store = both
    # The store is as far as Prometheus' last batch.
    eventually(
        lambda: about(ask(store, alert["expr"])) == about(ask(prometheus, alert["expr"])), "the same answer of both"
    )


def test_promtool_and_vmagent_accept_the_configurations(tmp_path: Path) -> None:
    for path in (*CONFIGS.iterdir(), RULES):
        shutil.copy(path, tmp_path)
    commands = [["promtool", "check", "config", str(tmp_path / "prometheus-remote-write.yml")]]
    if shutil.which("vmagent"):
        remote = "-remoteWrite.url=http://127.0.0.1:9/"
        commands.append(["vmagent", f"-promscrape.config={tmp_path / 'vmagent.yml'}", remote, "-dryRun"])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_both_configurations_scrape_the_same_collectors() -> None:
    one, other = (yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.iterdir()))
    assert one["scrape_configs"] == other["scrape_configs"]
    ((scraped,), targets) = one["scrape_configs"], one["scrape_configs"][0]["static_configs"][0]["targets"]
    assert scraped["job_name"] == "foreshock"
    assert all(target.endswith(f":{DEFAULT_HTTP_PORT}") for target in targets)
