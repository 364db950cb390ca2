"""Labels and annotations of an alert, as Prometheus fills them in from the rule file."""

from __future__ import annotations

from foreshock_collector.alerting.addresses import Addresses
from foreshock_collector.alerting.alert import EXPERIMENT_LABEL, RUN_LABEL, VALUE, Alert
from foreshock_collector.alerting.facts import Facts
from foreshock_collector.alerting.lookups import Lookup


def labels_of(alert: Alert, facts: Facts) -> dict[str, str]:
    """Return the labels of an alert on a run."""
    return {
        "alertname": alert.name,
        "experiment": facts.experiment,
        "run": facts.run,
        "severity": alert.severity,
    }


def annotations_of(alert: Alert, facts: Facts, value: float, addresses: Addresses) -> dict[str, str]:
    """Return the annotations of an alert on a run. value: of its condition."""
    # Only the texts of the tables are templates: a run's name may look like one.
    fields = {RUN_LABEL: facts.run, EXPERIMENT_LABEL: facts.experiment, VALUE: f"{value:.0f}"}
    sentences = [
        _render(part, facts) if isinstance(part, Lookup) else _fill(part, fields) for part in alert.description
    ]
    annotations = {
        "summary": alert.summary,
        "description": " ".join(sentence for sentence in sentences if sentence is not None),
        "run": facts.run,
    }
    for name, lookup in alert.values.items():
        found = _render(lookup, facts)
        annotations[name] = "unknown" if found is None else found
    return annotations | addresses.links_of_run(alert, facts.run)


def _render(lookup: Lookup, facts: Facts) -> str | None:
    assert lookup.render is not None
    return lookup.render(facts)


def _fill(text: str, fields: dict[str, str]) -> str:
    """Replace each field once, from left to right."""
    found = [(text.index(field), field) for field in fields if field in text]
    if not found:
        return text
    start, field = min(found)
    return text[:start] + fields[field] + _fill(text[start + len(field) :], fields)
