"""Every panel and every rule over a recorded incident: a real collector, a real Prometheus."""

from __future__ import annotations

import asyncio
import math
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from foreshock_protos.columns import WEIGHT_BLOCKS
from foreshock_protos.v1 import telemetry_pb2 as pb
from grafana.dashboards import DASHBOARDS
from grafana.panels import Query
from tests.grafana.linting import RULES, filled
from tests.support.alerting import (
    ALERTS,
    faster,
    programs,
    request,
    start_alertmanager,
    start_prometheus,
    with_receiver,
)
from tests.support.collector_process import Collector
from tests.support.streams import Stream, hello, steps
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration

WORLD = 2
LAYERS = ("embedding", "head")
LOOKED_AT = (
    *("gradient_absolute_maximum", "parameter_norm", "update_ratio"),
    *("first_moment_norm", "second_moment_norm"),
)
PORTION = 20
"""Steps between two scrapes, so that rates and increases have something to show."""


class Recorded:
    """A Prometheus that has seen an explosion."""

    def __init__(self, prometheus: str) -> None:
        self._prometheus = prometheus

    def ask(self, expr: str) -> list[dict[str, Any]]:
        path = f"/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
        found: list[dict[str, Any]] = request(self._prometheus, "GET", path)["data"]["result"]
        return found

    def firing(self) -> set[str]:
        alerts = request(self._prometheus, "GET", "/api/v1/alerts")["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def norms() -> list[float]:
    calm = [1.0 + 0.1 * math.sin(i) for i in range(8 * PORTION)]
    return [*calm, *(3.0**i for i in range(1, PORTION - 4)), *[math.nan] * 5]


async def feed(server: Collector, recorded: Recorded) -> None:
    streams = [Stream(server) for _ in range(WORLD)]
    for rank, stream in enumerate(streams):
        place = pb.Topology(rank=rank, world_size=WORLD)
        model = pb.ModelSummary(layers=LAYERS)
        await stream.send(hello("boom", instance=f"boom-{rank}", topology=place, model=model))
    values = norms()
    for start in range(0, len(values), PORTION):
        portion = values[start : start + PORTION]
        for rank, stream in enumerate(streams):
            told = {"local_norm": [n * (1 + rank) for n in portion], "loss": portion, "learning_rate": [0.1] * PORTION}
            told |= dict.fromkeys(LOOKED_AT, [0.01] + [0.0] * (PORTION - 1))
            flags = [pb.LOSS_OBSERVED | pb.LOCAL_NORMS] * PORTION
            message = steps(start + 1, portion, run="boom", instance=f"boom-{rank}", flags=flags, **told)
            if rank == 0:
                message.steps.global_layer_norms.extend(norm * share for norm in portion for share in (0.6, 0.8))
                message.steps.weight_rows.append(0)
                for block in WEIGHT_BLOCKS:
                    getattr(message.steps, block).extend((0.01, 0.02))
            await stream.send(message)
        for stream in streams:
            await stream.stored(start + PORTION)
        total = f'foreshock_steps_total{{run="boom"}} >= {start + PORTION}'
        await asyncio.to_thread(eventually, partial(recorded.ask, total), "a scrape")
    await asyncio.to_thread(
        eventually, lambda: "ForeshockExplodingGradients" in recorded.firing(), "an evaluation of the rules"
    )
    for stream in streams:
        await stream.close()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder: Path = tmp_path_factory.mktemp("recorded")
    with ExitStack() as stack:
        collector = Collector(folder)
        stack.callback(collector.stop)
        start = stack.enter_context(programs())
        alertmanager = start_alertmanager(start, with_receiver("http://127.0.0.1:9/", folder), folder)
        config = faster(folder, collector.url.removeprefix("http://"), alertmanager)
        prometheus = start_prometheus(start, config, folder)
        found = Recorded(prometheus)
        asyncio.run(feed(collector, found))
        yield found


def queries() -> list[tuple[str, Query]]:
    from grafana import dashboards

    found: list[tuple[str, Query]] = []

    def keep(uid: str, title: str, description: str, variables: Any, rows: Any) -> dict[str, Any]:
        found.extend((f"{uid} {panel.title}", query) for row in rows for panel in row for query in panel.queries)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dashboards, "dashboard", keep)
        for build in DASHBOARDS.values():
            build()
    return found


@pytest.mark.parametrize(("where", "query"), queries(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_panels_query_answers(where: str, query: Query, recorded: Recorded) -> None:
    answer = recorded.ask(filled(query.expr, interval="30s"))
    assert answer or query.may_be_empty


def test_the_incident_itself_is_shown(recorded: Recorded) -> None:
    (incident,) = recorded.ask("foreshock_incident_info")
    assert incident["metric"]["verdict"] == "exploding_gradients"
    assert [value["value"][1] for value in recorded.ask("foreshock_run_ranks_expected")] == ["2"]


@pytest.mark.parametrize("number", range(len(RULES)), ids=[rule["title"] for rule in RULES])
def test_a_rule_of_grafanas_is_true_where_its_twin_is(number: int, recorded: Recorded) -> None:
    rule, alert = RULES[number], ALERTS[number]
    threshold = rule["data"][2]["model"]["conditions"][0]["evaluator"]
    assert threshold == {"type": "gt", "params": [0]}

    def found(expr: str) -> set[tuple[str, ...]]:
        return {(s["metric"].get("experiment", ""), s["metric"].get("run", "")) for s in recorded.ask(expr)}

    assert found(f"({rule['data'][0]['model']['expr']}) > 0") == found(alert["expr"])


def test_what_should_fire_does_and_nothing_else(recorded: Recorded) -> None:
    assert recorded.firing() == {
        "ForeshockExplodingGradients", "ForeshockGradientBuildUp", "ForeshockGradientSpike", "ForeshockLossSpike",
    }  # fmt: skip
