"""The text of /metrics: what prometheus-client's renderers make of the same samples, at a fraction of their cost.

Numbers are written as Python does, which every parser reads alike: 1764275911.5, not 1.7642759115e+09.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client import exposition
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from foreshock_collector.catalogue import Kind, Series
from foreshock_collector.web.samples import Labels, Samples

_TYPES = (Kind.COUNTER, Kind.HISTOGRAM)
_SAMPLES_AT_ONCE = 200
"""Of a series of a run each: a few milliseconds."""
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


class SampleSource(Protocol):
    """Has the samples of some series."""

    @property
    def series(self) -> Sequence[Series]:
        """Series, in the order of their families."""

    def samples(self) -> Iterator[Samples]:
        """Return the samples, in the order that they have within their families."""


@dataclass(slots=True)
class _Lines:
    """The lines of one series of one run: all but the values stays, and the text too while the values do."""

    further: tuple[Labels, ...]
    heads: list[str]
    """What stands before each value: the end of the line before, name and labels."""
    values: list[float] = field(default_factory=list)
    text: str = ""


class Renderer:
    """Renders what several sources have, one after the other.

    rest: a collector of prometheus-client, which is rendered by that, behind all others.
    """

    def __init__(self, sources: Sequence[SampleSource], rest: Collector) -> None:
        self._sources = sources
        self._rest = rest
        self._lines: dict[tuple[str, Labels], _Lines] = {}

    def render(self, *, as_openmetrics: bool = False) -> bytes:
        """Return the text, in Prometheus' own format or in OpenMetrics'."""
        return b"".join(self.render_in_parts(as_openmetrics=as_openmetrics))

    def render_in_parts(self, *, as_openmetrics: bool) -> Iterator[bytes]:
        """Yield nothing after some of the samples each, so that others may have their turn, and at last the text.

        One caller at a time.
        """
        text: list[str] = []
        used: dict[tuple[str, Labels], _Lines] = {}
        for source in self._sources:
            texts: dict[str, list[str]] = {series.name: [] for series in source.series}
            for number, samples in enumerate(source.samples()):
                if number % _SAMPLES_AT_ONCE == 0:
                    yield b""
                texts[samples.series.name].append(self._text_of(samples, used))
            for series in source.series:
                text.append(_header(series, as_openmetrics))
                text += texts[series.name]
                text.append("\n")
        # Those of runs that have expired are forgotten.
        self._lines = used
        rest: bytes = (openmetrics if as_openmetrics else exposition).generate_latest(self._rest)
        yield "".join(text).encode() + rest

    def _text_of(self, samples: Samples, used: dict[tuple[str, Labels], _Lines]) -> str:
        key = samples.series.name, samples.owner
        lines = self._lines.get(key)
        if lines is None or lines.further != samples.further:
            lines = _Lines(samples.further, _heads(samples))
        if lines.values != samples.values:
            lines.values = samples.values
            lines.text = _text(samples, lines.heads)
        used[key] = lines
        return lines.text


def _header(series: Series, as_openmetrics: bool) -> str:
    name, help_text = series.name, series.help.replace("\\", r"\\").replace("\n", r"\n")
    if as_openmetrics:
        # There, a family of counters has no suffix.
        name, help_text = name.removesuffix("_total"), help_text.replace('"', r"\"")
    kind = series.kind.value if series.kind in _TYPES else "gauge"
    return f"# HELP {name} {help_text}\n# TYPE {name} {kind}"


def _text(samples: Samples, heads: list[str]) -> str:
    values = samples.values
    if samples.series.kind is Kind.HISTOGRAM and values:
        values = [*values[:-1], values[-2], values[-1]]
    parts = heads * 2
    parts[::2] = heads
    parts[1::2] = map(repr, values)
    return "".join(parts)


def _heads(samples: Samples) -> list[str]:
    series, owner, further = samples.series, samples.owner, samples.further
    if series.kind is not Kind.HISTOGRAM:
        return [_head(series.name, series.labels, (*owner, *labels)) for labels in further]
    if not further:
        return []
    buckets = [_head(f"{series.name}_bucket", (*series.labels, "le"), (*owner, *bound)) for bound in further]
    return buckets + [_head(f"{series.name}_{name}", series.labels, owner) for name in ("count", "sum")]


def _head(name: str, names: Labels, values: Labels) -> str:
    labels = sorted(zip(names, values, strict=True))
    inside = ",".join(f'{label}="{str(value).translate(_ESCAPES)}"' for label, value in labels)
    return f"\n{name}{{{inside}}} " if inside else f"\n{name} "
