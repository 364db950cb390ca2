"""Every verdict, once: its title and wording, how sure it is, and the alert and condition that it leads to.

Diagnosis decides which entry applies and fills in the numbers. The catalogue, the alert rules, the API, the page and
the tables of the documentation are made from these entries.
"""

from __future__ import annotations

from typing import Literal, get_args

from foreshock_collector.analysis.failure_entries import FAILURE_ENTRIES, FailureCause
from foreshock_collector.analysis.fault_entries import FAULT_ENTRIES, FaultCause
from foreshock_collector.analysis.verdict_entry import Entry, Outcome

Cause = Literal["healthy", FailureCause, FaultCause]
"""Name of a verdict."""

_HEALTHY = Entry(
    title="Healthy",
    outcome=Outcome(alert="", severity=None, condition="running", finite=True),
    observed="none of the below",
    summary="All values are finite up to step {step}.",
    advice=(),
    confidence=1.0,
)
_ENTRIES: list[tuple[Cause, Entry]] = [("healthy", _HEALTHY), *FAILURE_ENTRIES.items(), *FAULT_ENTRIES.items()]
VERDICT_TABLE = dict(_ENTRIES)

assert VERDICT_TABLE.keys() == set(get_args(Cause))
