"""What a rank is told of its run, for tools that mirror it: the newest incident or event, in a sentence."""

from __future__ import annotations

from foreshock_collector.analysis.verdict_table import VERDICT_TABLE
from foreshock_collector.state.events import DetectedEvent
from foreshock_collector.state.runs import Run

MOST_CHARACTERS = 200
"""A ring has room for 255 bytes, and a character of a name may take several."""
_EVENTS = {
    "spike": "Spike of the gradient norm",
    "build_up": "Build-up of the gradient norm",
    "loss_spike": "Spike of the loss",
}
"""Events that no incident reports."""


def notice(run: Run) -> str:
    """Return the sentence; empty if nothing has happened. An incident stays until a later attempt makes steps."""
    incident = run.incidents.newest
    attempt = run.newest.number
    if incident is not None and incident.attempt == attempt:
        verdict = incident.verdict
        return f"{VERDICT_TABLE[verdict.cause].title}: {verdict.summary}"[:MOST_CHARACTERS]
    for each in reversed(run.events.kept):
        if isinstance(each, DetectedEvent) and each.event.attempt == attempt and each.kind in _EVENTS:
            event, value, usual = each.event, each.event.value, each.event.usual
            numbers = "" if value is None or usual is None else f": {value:.3g}, usually {usual:.3g}"
            return f"{_EVENTS[each.kind]} at step {event.step}{numbers}"
    return ""
