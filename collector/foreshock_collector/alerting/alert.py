"""An alert: its condition, severity and text.

An alert on a run covers the whole run, however many ranks it has. The rank, layer, step and lead are annotations and
not labels, because an alert whose labels change is another alert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from foreshock_collector import catalogue as c
from foreshock_collector.alerting.condition import Condition
from foreshock_collector.alerting.lookups import Lookup, largest, number

RUN_LABEL = "{{ $labels.run }}"
EXPERIMENT_LABEL = "{{ $labels.experiment }}"
RUN = f"{RUN_LABEL} of {EXPERIMENT_LABEL}"
VALUE = '{{ $value | printf "%.0f" }}'
"""The value of an alert's expression, as a whole number."""
NEWEST_STEP = {"newest_step": number(c.STEP)}
WORST = {"worst_rank": largest(c.LOCAL_GRADIENT_NORM, "rank"), "layer": largest(c.LAYER_GRADIENT_NORM, "layer")}


@dataclass(frozen=True, kw_only=True)
class Alert:
    """Defines one alert rule."""

    name: str
    """Also the name of its runbook in docs/runbooks."""
    severity: Literal["critical", "warning", "info"]
    condition: Condition
    wait: str = ""
    """How long the condition must hold before the alert fires: `for` in the rule file."""
    keep_firing_for: str = ""
    summary: str
    """One sentence, the same for every run."""
    description: tuple[str | Lookup, ...]
    """Sentences for people, in order."""
    values: Mapping[str, Lookup] = field(default_factory=dict)
    """Annotations for programs, each with one value."""
    of_run: bool = True
    """Whether it is about one run, and so names the run and links to the run's page; otherwise about the collector."""

    @property
    def expr(self) -> str:
        """PromQL; the alert fires for every series that it returns."""
        return self.condition.promql

    @property
    def dashboard(self) -> str:
        """UID of the Grafana dashboard to open."""
        return "foreshock-run" if self.of_run else "foreshock-collector"
