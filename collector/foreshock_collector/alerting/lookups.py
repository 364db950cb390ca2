"""Queries over one run's series, and annotations whose text comes from such a query."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from foreshock_collector.alerting.facts import Facts
from foreshock_collector.catalogue import INCIDENT_INFO, Series

WINDOW = "[1m]"
"""How far back a rule looks for the newest sample. A failed scrape ends every series at once, so an instant query would
resolve an alert on the first one; with this, three scrapes in a row may fail."""


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """Text that Prometheus fills in from a query when the alert fires.

    Grafana's templates cannot query, so its copies of the alerts omit lookups: a description must read well without
    them.
    """

    query: str
    """PromQL. `%[1]q` stands for the quoted experiment of the alert, `%[2]q` for its run; both or neither."""
    text: str
    """Go template over the result of the query."""
    render: Callable[[Facts], str | None] | None = None
    """Returns the same text from a run's series, or None where the query returns nothing. None: it needs Prometheus."""

    def as_sentence(self) -> str:
        """Part of a description; empty if the query returns nothing."""
        return f"{{{{- with {self._result()} }}}}\n{self.text}{{{{ end }}}}"

    def as_value(self) -> str:
        """Annotation of its own; `unknown` if the query returns nothing."""
        return f"{{{{ with {self._result()} -}}}}\n{self.text}{{{{ else }}}}unknown{{{{ end }}}}"

    def _result(self) -> str:
        # Go's printf complains of arguments that its text does not use.
        labels = " $labels.experiment $labels.run" if "%[" in self.query else ""
        return f"printf {json.dumps(self.query)}{labels} | query"


def newest(series: Series, matchers: str = "") -> str:
    """Query for the newest samples of a series of the alert's run."""
    return f"last_over_time({_selector(series, matchers)}{WINDOW})"


def increase(series: Series, window: str, matchers: str = "") -> str:
    """Query for how much a counter of the alert's run grew within a window such as `10m`."""
    return f"increase({_selector(series, matchers)}[{window}])"


def number(series: Series, form: str = "%.0f", sentence: str = "{}") -> Lookup:
    """Look up the value of a series. sentence: text around the number, which stands at `{}`."""

    def render(facts: Facts) -> str | None:
        value = facts.value(series)
        return None if value is None else sentence.replace("{}", form % value)

    value = f'{{{{ . | first | value | printf "{form}" }}}}'
    return Lookup(query=newest(series), text=sentence.replace("{}", value), render=render)


def largest(series: Series, label: str, sentence: str = "{}") -> Lookup:
    """Look up which rank or layer has the largest value. sentence: as for `number`."""

    def render(facts: Facts) -> str | None:
        values = facts.all(series)
        return sentence.replace("{}", max(values, key=lambda labels: values[labels])[0]) if values else None

    name = f'{{{{ . | first | label "{label}" }}}}'
    return Lookup(query=f"topk(1, {newest(series)})", text=sentence.replace("{}", name), render=render)


def incident_sentence(alert: str, sentence: str) -> Lookup:
    """Look up the newest incident that an alert reports. sentence: with the fields of `_FIELDS` in braces."""
    fields = {name: go for name, (go, _) in _FIELDS.items()}

    def render(labels: dict[str, str]) -> str:
        return sentence.format_map({name: write(labels) for name, (_, write) in _FIELDS.items()})

    return _incident(alert, f"{{{{ with . | first }}}}{sentence.format_map(fields)}{{{{ end }}}}", render)


def incident_label(alert: str, label: str) -> Lookup:
    """Look up one label of the newest incident."""
    return _incident(alert, f"{{{{ (. | first).Labels.{label} }}}}", lambda labels: labels[label])


def known_label(alert: str, label: str) -> Lookup:
    """Look up a label that is empty where the collector cannot name a value."""
    text = f"{{{{ with (. | first).Labels.{label} }}}}{{{{ . }}}}{{{{ else }}}}unknown{{{{ end }}}}"
    return _incident(alert, text, lambda labels: labels[label] or "unknown")


_FIELDS: dict[str, tuple[str, Callable[[dict[str, str]], str]]] = {
    "first_step": ("{{ .Labels.first_step }}", lambda labels: labels["first_step"]),
    "lead": (
        '{{ .Labels.lead_steps }} step{{ if ne .Labels.lead_steps "1" }}s{{ end }}',
        lambda labels: f"{labels['lead_steps']} step{'' if labels['lead_steps'] == '1' else 's'}",
    ),
    "first_of_all": (
        '{{ if eq .Labels.verdict "first_step_nonfinite" }}, the first step of all{{ end }}',
        lambda labels: ", the first step of all" if labels["verdict"] == "first_step_nonfinite" else "",
    ),
    "rank": (
        "{{ with .Labels.rank }}{{ . }}{{ else }}unknown{{ end }}",
        lambda labels: labels["rank"] or "unknown",
    ),
    "layer": (
        "{{ with .Labels.layer }}{{ . }}{{ else }}unknown{{ end }}",
        lambda labels: labels["layer"] or "unknown",
    ),
}
"""Fields of a sentence about an incident: as Go template, and as a function of the incident's labels."""


def _incident(alert: str, text: str, write: Callable[[dict[str, str]], str]) -> Lookup:
    def render(facts: Facts) -> str | None:
        labels = facts.incident(alert)
        return None if labels is None else write(labels)

    matcher = f'alert="{alert}"'
    # A new incident replaces the series of the last one, whose sample stays in the window for a minute: the instant
    # query comes first, and the window only covers failed scrapes.
    query = f"{_selector(INCIDENT_INFO, matcher)} or on (run) {newest(INCIDENT_INFO, matcher)}"
    return Lookup(query=query, text=text, render=render)


def _selector(series: Series, matchers: str = "") -> str:
    return f"{series.name}{{experiment=%[1]q,run=%[2]q{',' if matchers else ''}{matchers}}}"
