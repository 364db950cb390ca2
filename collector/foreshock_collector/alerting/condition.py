"""When an alert fires: as PromQL, and as a function of a run's series for notifications that the collector sends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from foreshock_collector import catalogue as c
from foreshock_collector.alerting.facts import Facts
from foreshock_collector.alerting.lookups import WINDOW

_RECENT_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Defines when an alert fires, twice: for Prometheus, and for the collector itself."""

    promql: str
    """The alert fires for every series that it returns."""
    value: Callable[[Facts], float | None] | None = None
    """Returns what `promql` does for one run, or None while it returns nothing. None: it needs Prometheus."""

    def __or__(self, other: Condition) -> Condition:
        first, second = self.value, other.value
        assert first is not None
        assert second is not None

        def either(facts: Facts) -> float | None:
            found = first(facts)
            return second(facts) if found is None else found

        return Condition(promql=f"{self.promql}\nor\n{other.promql}", value=either)


def by_run(series: c.Series, verdicts: tuple[str, ...] = ()) -> str:
    """Query for the newest value of a series, one for each run. verdicts: count only these."""
    matcher = f'verdict="{verdicts[0]}"' if len(verdicts) == 1 else f'verdict=~"{"|".join(verdicts)}"'
    selector = series.name + (f"{{{matcher}}}" if verdicts else "")
    return f"max by (experiment, run) (last_over_time({selector}{WINDOW}))"


def recent(series: c.Series, verdicts: tuple[str, ...] = ()) -> Condition:
    """Condition: the event of this timestamp happened within the last five minutes.

    A timestamp of 0 means never. Unlike increase(), this sees an event on the first scrape of a series and across a
    restart of the collector, where a counter reads 1 before and 1 after.
    """

    def age(facts: Facts) -> float | None:
        seconds = facts.now - _newest(facts, series, verdicts)
        return seconds if seconds < _RECENT_SECONDS else None

    return Condition(promql=f"time() - {by_run(series, verdicts)} < {_RECENT_SECONDS}", value=age)


def still_open(verdicts: tuple[str, ...]) -> Condition:
    """Condition: an incident with one of these verdicts is open."""

    def count(facts: Facts) -> float | None:
        return _newest(facts, c.OPEN_INCIDENTS, verdicts) or None

    return Condition(promql=f"{by_run(c.OPEN_INCIDENTS, verdicts)} > 0", value=count)


def _newest(facts: Facts, series: c.Series, verdicts: tuple[str, ...]) -> float:
    """Return the largest sample with one of these verdicts, or of all; 0 if there is none."""
    found = (value for labels, value in facts.all(series).items() if not verdicts or labels[0] in verdicts)
    return max(found, default=0.0)
