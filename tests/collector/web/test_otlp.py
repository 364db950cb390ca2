"""What an OpenTelemetry receiver gets."""

from __future__ import annotations

import asyncio
import gzip
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from foreshock_collector.catalogue import CATALOGUE, Kind
from foreshock_collector.config import ConfigError
from foreshock_collector.ingest.statistics import IngestStatistics
from foreshock_collector.server import Server
from foreshock_collector.web.otlp import UNITS, OtlpExport
from tests.support.streams import Stream, config, families, hello, serving, steps, value
from tests.support.waiting import eventually

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="opentelemetry-exporter-otlp-proto-http")


class Receiver:
    """Listens for OTLP/HTTP and decodes each request. status: of its answers."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

        self.status = 200
        self.headers: dict[str, str] = {}
        self.requests: list[Any] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                receiver.headers = {name.lower(): text for name, text in self.headers.items()}
                receiver.requests.append(ExportMetricsServiceRequest.FromString(body))
                self.send_response(receiver.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1/metrics"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def metrics(self) -> dict[str, Any]:
        """The newest request's metrics by name."""
        ((scope,),) = ([r.scope_metrics[0]] for r in self.requests[-1].resource_metrics)
        return {metric.name: metric for metric in scope.metrics}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()
    logging.getLogger("opentelemetry.exporter").setLevel(logging.NOTSET)


def points(metric: Any) -> list[Any]:
    return list(getattr(metric, metric.WhichOneof("data")).data_points)


def labels(point: Any) -> dict[str, str]:
    return {each.key: each.value.string_value for each in point.attributes}


def test_a_receiver_gets_every_series_of_the_metrics_page(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20secret")

    async def test() -> None:
        async with Server(config(tmp_path, metrics_cache_seconds=0, otlp_endpoint=receiver.url)) as server:
            stream = Stream(server)
            await stream.send(hello(), steps(1, [1.0, 2.0, 3.0]))
            await stream.stored(3)
            await asyncio.to_thread(eventually, lambda: receiver.requests, "the export at the start")
            assert server.otlp_export is not None
            await server.otlp_export.export()
            shown, sent = await families(server), receiver.metrics()
            for series in CATALOGUE:
                name = series.name
                family = shown.get(name) or shown[name.removesuffix("_total")]
                groups = {tuple(sorted((k, v) for k, v in s.labels.items() if k != "le")) for s in family.samples}
                assert (
                    {tuple(sorted(labels(p).items())) for p in points(sent[name])} == groups
                    if groups
                    else (name not in sent)
                ), name
                if groups:
                    assert sent[name].unit == UNITS[series.unit]
                    assert sent[name].WhichOneof("data") == {Kind.COUNTER: "sum", Kind.HISTOGRAM: "histogram"}.get(
                        series.kind, "gauge"
                    )
            (norm,) = points(sent["foreshock_global_gradient_norm"])
            assert norm.as_double == value(shown, "foreshock_global_gradient_norm") == 3.0
            assert sent["foreshock_steps_total"].sum.is_monotonic
            (histogram,) = points(sent["foreshock_gradient_norm"])
            assert histogram.count == sum(histogram.bucket_counts) == 3
            assert len(histogram.bucket_counts) == len(histogram.explicit_bounds) + 1
            assert histogram.sum == 6.0
            resource = receiver.requests[-1].resource_metrics[0].resource
            assert labels(resource)["service.name"] == "foreshock-collector"
            assert receiver.headers["authorization"] == "Bearer secret"
            await stream.close()

    serving(test())


def test_opentelemetrys_own_variables_name_the_service(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=lab")
    attributes = {"service.name": "foreshock-collector", "service.version": "1"}
    serving(OtlpExport(receiver.url, CollectorRegistry(), IngestStatistics(), lambda: 1.0, attributes).export())
    found = labels(receiver.requests[-1].resource_metrics[0].resource)
    assert (found["service.name"], found["service.version"]) == ("ours", "1")
    assert found["deployment.environment"] == "lab"


def test_a_receiver_that_refuses_is_counted_and_logged_once(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "foreshock_collector")
    statistics = IngestStatistics()
    export = OtlpExport(receiver.url, CollectorRegistry(), statistics, lambda: 1.0, {})

    async def test() -> None:
        for receiver.status in (400, 400, 200):
            await export.export()

    serving(test())
    assert statistics.otlp_failures == 2
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("foreshock_collector")]
    assert [line.partition(receiver.url)[0] for line in lines] == [
        "cannot export to --otlp-endpoint ",
        "exports to --otlp-endpoint ",
    ]
    assert sum(r.name.startswith("opentelemetry.exporter") for r in caplog.records) == 1


def test_series_that_cannot_be_read_end_no_export(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def collect(self) -> Any:
            raise RuntimeError("broken")

    broken: Any = Broken()
    statistics = IngestStatistics()
    serving(OtlpExport(receiver.url, broken, statistics, lambda: 1.0, {}).export())
    assert statistics.otlp_failures == 1
    assert "RuntimeError: broken" in caplog.text
    assert receiver.requests == []


@pytest.mark.parametrize("url", ["localhost:4318", "ftp://host/v1/metrics", "http:///v1/metrics"])
def test_an_endpoint_that_is_no_url_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="--otlp-endpoint must be"):
        config(tmp_path, otlp_endpoint=url)
