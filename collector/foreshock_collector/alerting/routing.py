"""Which alerts notify, and when, without Alertmanager: as its example in deploy/alertmanager configures it."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock_collector.alerting.alerts import ALERTS

_SIGNS = ("ForeshockGradientSpike", "ForeshockGradientBuildUp", "ForeshockLossSpike")
_ABSENCES = ("ForeshockRankSilent", "ForeshockRanksMissing", "ForeshockRunStalled")
_NONFINITE = ("ForeshockExplodingGradients", "ForeshockSuddenNonFinite")


@dataclass(frozen=True, kw_only=True)
class Inhibition:
    """Defines which alerts of a run do not notify while a worse one of the same run fires."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]


INHIBITIONS = (
    # The causes of a failure, once it has happened.
    Inhibition(sources=_NONFINITE, targets=_SIGNS),
    # Consequences of a death, or of a script that exits on its NaN: the remaining ranks wait for the missing ones.
    Inhibition(sources=("ForeshockRunDied", *_NONFINITE), targets=_ABSENCES),
)

GROUP_WAIT_SECONDS = {"critical": 0.0, "warning": 10.0}
"""How long a new alert waits for a worse one, by severity. Other severities do not notify."""

NOTIFIED = tuple(
    alert for alert in ALERTS if alert.condition.value is not None and alert.severity in GROUP_WAIT_SECONDS
)
"""Alerts on which the collector itself can notify. The others need Prometheus."""


def is_inhibited(name: str, firing: set[str]) -> bool:
    """Return whether an alert of a run does not notify because of others of that run. firing: names."""
    return any(name in each.targets and firing & set(each.sources) for each in INHIBITIONS)
