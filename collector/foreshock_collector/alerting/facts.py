"""Series of one run, as /metrics exports them: what an alert's condition and its texts are evaluated on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from foreshock_collector.catalogue import INCIDENT_INFO, RUN, Series

Labels = tuple[str, ...]
"""Values of a series' labels beyond the experiment and the run, in their order."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Holds the samples of one run at one moment. All are finite."""

    experiment: str
    run: str
    now: float
    """Unix time."""
    samples: Mapping[str, Mapping[Labels, float]]
    """By name of the series, then by labels."""

    def all(self, series: Series) -> Mapping[Labels, float]:
        """Return the samples of a series; empty if it has none."""
        return self.samples.get(series.name, {})

    def value(self, series: Series) -> float | None:
        """Return the sample of a series without further labels; None if there is none."""
        return self.all(series).get(())

    def incident(self, alert: str) -> dict[str, str] | None:
        """Return the labels of the newest incident that an alert reports; None if there is none."""
        names = INCIDENT_INFO.labels[len(RUN) :]
        for values in self.all(INCIDENT_INFO):
            labels = dict(zip(names, values, strict=True))
            if labels["alert"] == alert:
                return labels
        return None
