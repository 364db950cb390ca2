"""Base URLs of the links in alerts."""

from __future__ import annotations

import argparse
import urllib.parse
from dataclasses import dataclass
from typing import Self

from foreshock_collector.alerting.alert import Alert
from foreshock_protos import DEFAULT_HTTP_PORT

_PATH = 'urlquery | reReplaceAll "\\\\+" "%20"'
"""Go template: quote a name for the path of a URL, where a space is %20. In a query string urlquery's + is right."""


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Base URLs of the links in alerts, as people reach them; by default all on this machine."""

    collector: str = f"http://127.0.0.1:{DEFAULT_HTTP_PORT}"
    grafana: str = "http://127.0.0.1:3000"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Add an option for each address."""
        parser.add_argument("--collector-url", default=cls.collector, metavar="URL", help="of the collector's page")
        parser.add_argument("--grafana-url", default=cls.grafana, metavar="URL", help="of Grafana")

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Self:
        """Return the addresses that the options give."""
        return cls(collector=options.collector_url.rstrip("/"), grafana=options.grafana_url.rstrip("/"))

    def links(self, alert: Alert) -> dict[str, str]:
        """Links of an alert, by the name of their annotation."""
        links = {"runbook_url": self.runbook(alert.name)}
        if alert.of_run:
            links["page_url"] = f"{self.collector}/run/{{{{ $labels.run | {_PATH} }}}}"
        variable = "?var-run={{ $labels.run | urlquery }}" if alert.of_run else ""
        return links | {"dashboard_url": f"{self.grafana}/d/{alert.dashboard}{variable}"}

    def links_of_run(self, alert: Alert, run: str) -> dict[str, str]:
        """Links of an alert on this run to the collector's pages."""
        page = f"{self.collector}/run/{urllib.parse.quote(run, safe='')}"
        return {"runbook_url": self.runbook(alert.name), "page_url": page}

    def runbook(self, alert: str) -> str:
        """Address of an alert's runbook."""
        return f"{self.collector}/runbooks/{alert}"
