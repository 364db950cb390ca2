"""The text of /metrics against prometheus-client's, and when it is rendered anew."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from foreshock_collector import catalogue as c
from foreshock_collector.server import Server
from foreshock_collector.state.totals import Histogram
from foreshock_collector.web.exposition import RunSeries
from foreshock_collector.web.rendering import Renderer
from foreshock_collector.web.samples import Sample, families_of
from tests.support.fuzzing import bounded
from tests.support.job_in_memory import NAN, Job
from tests.support.streams import Stream, config, families, hello, serving, steps, value

SERIES = (c.STEPS, c.RUN_ACTIVE, c.LAST_REPORT, c.GRADIENT_NORM)


class Given(Collector):
    """Samples as a test gives them."""

    series = SERIES

    def __init__(self, given: list[Sample]) -> None:
        self.given = given

    def samples(self) -> Iterator[Sample]:
        yield from self.given

    def collect(self) -> Iterator[Metric]:
        yield from families_of(SERIES, self.given)


def by_client(*sources: Collector) -> str:
    registry = CollectorRegistry()
    for source in sources:
        registry.register(source)
    return generate_latest(registry).decode()


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
            samples.append(Sample.from_histogram(series, (experiment, run), histogram))
        else:
            labels = (experiment, run, "7")[: len(series.labels)]
            samples.append(Sample(series, labels, number))
    source = Given(samples)
    renderer = Renderer((source,), CollectorRegistry())
    expected = by_client(source)
    assert renderer.render().decode() == expected
    # Once more: what stands before the values is known by now.
    assert renderer.render().decode() == expected


def test_a_run_is_rendered_as_prometheus_client_renders_it_while_it_changes_and_goes() -> None:
    job = Job(ranks=2, layers=2)
    series = RunSeries(job.runs, lambda: job.now, ended_seconds=900.0, silent=900.0)
    own = CollectorRegistry()
    Gauge("other", "Of another collector.", registry=own).set(3)
    renderer = Renderer((series,), own)

    def check() -> str:
        text = renderer.render().decode()
        assert text == by_client(series) + generate_latest(own).decode()
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
    assert not any(run == "r" for _, labels, _ in renderer._heads for run in labels[1:2]), "it is forgotten"


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
