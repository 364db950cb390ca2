"""The text of /metrics against prometheus-client's, and when it is rendered anew."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import aiohttp
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, exposition
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from benchmarks.fuzz.live import numbers_alike
from foreshock_collector import catalogue as c
from foreshock_collector.server import Server
from foreshock_collector.state.totals import Histogram
from foreshock_collector.web.exposition import RunSeries
from foreshock_collector.web.rendering import Renderer
from foreshock_collector.web.samples import Samples, families_of
from tests.support.fuzzing import bounded
from tests.support.job_in_memory import NAN, Job
from tests.support.streams import Stream, config, families, hello, serving, steps, value

SERIES = (c.STEPS, c.RUN_ACTIVE, c.LAST_REPORT, c.GRADIENT_NORM)


class Given(Collector):
    """Samples as a test gives them."""

    series = SERIES

    def __init__(self, given: list[Samples]) -> None:
        self.given = given

    def samples(self) -> Iterator[Samples]:
        yield from self.given

    def collect(self) -> Iterator[Metric]:
        yield from families_of(SERIES, self.given)


def by_client(*sources: Collector, as_openmetrics: bool = False) -> str:
    registry = CollectorRegistry()
    for source in sources:
        registry.register(source)
    text: bytes = (openmetrics if as_openmetrics else exposition).generate_latest(registry)
    return text.decode()


texts = st.text(st.sampled_from('a\\\n"{},= é\U0001f600'), max_size=6)
numbers = st.floats() | st.integers(0, 2**60).map(float)


@bounded(300)
@given(st.lists(st.tuples(st.integers(0, 3), texts, texts, numbers), max_size=20))
def test_any_samples_are_rendered_as_prometheus_client_renders_them(told: list[tuple[int, str, str, float]]) -> None:
    samples = []
    for which, experiment, run, number in told:
        series = SERIES[which]
        if series is c.GRADIENT_NORM:
            histogram = Histogram(series.buckets)
            histogram.add(abs(number) if math.isfinite(number) else 1.0)
            samples.append(Samples.from_histogram(series, (experiment, run), histogram))
        else:
            further = ("7",)[: len(series.labels) - 2]
            samples.append(Samples(series, (experiment, run), {further: number}))
    source = Given(samples)
    renderer = Renderer((source,), CollectorRegistry())
    # Twice: what stands before the values is known then.
    for as_openmetrics in (False, True, False, True):
        expected = by_client(source, as_openmetrics=as_openmetrics)
        assert numbers_alike(renderer.render(as_openmetrics=as_openmetrics).decode()) == numbers_alike(expected)


def test_others_have_their_turn_while_many_samples_are_rendered() -> None:
    source = Given([Samples(c.STEPS, ("e", f"run{number}"), {(): 1.0}) for number in range(500)])
    parts = list(Renderer((source,), CollectorRegistry()).render_in_parts(as_openmetrics=False))
    assert parts[:-1] == [b"", b"", b""]
    assert numbers_alike(parts[-1].decode()) == numbers_alike(by_client(source))


def test_a_run_is_rendered_as_prometheus_client_renders_it_while_it_changes_and_goes() -> None:
    job = Job(ranks=2, layers=2)
    series = RunSeries(job.runs, lambda: job.now, ended_seconds=900.0, silent=900.0)
    own = CollectorRegistry()
    Gauge("other", "Of another collector.", registry=own).set(3)
    renderer = Renderer((series,), own)

    def check() -> str:
        text = renderer.render().decode()
        assert numbers_alike(text) == numbers_alike(by_client(series) + exposition.generate_latest(own).decode())
        return text

    check()
    job.tell(0, [1.0, 2.0], layer_norms=[0.5, 0.25] * 2)
    job.tell(1, [1.0, 2.0])
    job.settle(5.0)
    assert "foreshock_layer_gradient_norm{" in check()
    job.tell(0, [NAN])
    job.tell(1, [NAN])
    job.settle(5.0)
    assert "foreshock_incident_info{" in check()
    job.now += 2000.0
    job.settle()
    assert "foreshock_steps_total{" not in check()
    assert renderer._lines.keys() == set(), "it is forgotten"


def test_trouble_is_rendered_at_once_and_all_else_is_shared_for_a_while(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=3600)) as server:
            stream = Stream(server)
            await stream.send(hello(), steps(1, [1.0, 2.0]))
            await stream.stored(2)
            assert value(await families(server), "foreshock_steps") == 2
            await stream.send(steps(3, [1.0]))
            await stream.stored(3)
            assert value(await families(server), "foreshock_steps") == 2
            await stream.send(steps(4, [math.nan], global_nan_parameters=[1]))
            await stream.stored(4)
            while value(await families(server), "foreshock_steps") < 4:
                pass
            await stream.close()

    serving(test())


def test_openmetrics_is_negotiated_and_has_the_same_samples(tmp_path: Path) -> None:
    prometheus = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.4,*/*;q=0.2"

    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=3600)) as server:
            stream = Stream(server)
            await stream.send(hello(), steps(1, [1.0, 2.0, math.nan], global_nan_parameters=[0, 0, 1]))
            await stream.stored(3)
            texts = {}
            async with aiohttp.ClientSession() as session:
                for accept in ("text/plain", prometheus, "*/*"):
                    async with session.get(f"{server.url}/metrics", headers={"Accept": accept}) as answer:
                        assert answer.status == 200
                        assert answer.headers["Vary"] == "Accept, Accept-Encoding"
                        texts[accept] = answer.headers["Content-Type"], await answer.text()
            # Not before: the end of a stream changes a number.
            await stream.close()
            assert texts["*/*"] == texts["text/plain"]
            assert texts["text/plain"][0].startswith("text/plain; version=")
            assert texts[prometheus][0] == openmetrics.CONTENT_TYPE_LATEST
            assert texts[prometheus][1].endswith("\n# EOF\n")
            strict = {each.name: each for each in openmetrics_families(texts[prometheus][1])}  # type: ignore[no-untyped-call]
            plain = {each.name: each for each in text_string_to_metric_families(texts["text/plain"][1])}
            own = {name for name in plain if name.startswith("foreshock_")}
            assert own and own == {name for name in strict if name.startswith("foreshock_")}
            for name in own:
                assert [s[:3] for s in strict[name].samples] == [s[:3] for s in plain[name].samples], name
                assert strict[name].type == plain[name].type

    serving(test())
