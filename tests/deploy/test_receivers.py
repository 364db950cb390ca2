"""The receivers of the Alertmanager example: what each service gets, held against the form that it publishes."""

from __future__ import annotations

import json
import queue
import re
import shutil
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from foreshock_collector.commands import cli
from tests.support.alerting import ALERTMANAGER_CONFIG, Start, http_server, request, start_alertmanager
from tests.support.mailbox import mail_server

pytestmark = pytest.mark.integration

RECEIVERS = ALERTMANAGER_CONFIG.with_name("receivers.yml")
TEMPLATE = ALERTMANAGER_CONFIG.with_name("foreshock.tmpl")
TITLE = "CRITICAL TestNotification: test"
TEXT = (
    "This is a test of Foreshock's notifications; no run is in trouble. If you can read this, a real notification "
    "reaches you too.\nPage: http://127.0.0.1:9327/\nRunbook: http://127.0.0.1:9327/runbooks"
)


class Services:
    """Services that take JSON, by path."""

    def __init__(self) -> None:
        self.posted: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self.url = ""

    def first(self, count: int) -> dict[str, dict[str, Any]]:
        return dict(self.posted.get(timeout=60) for _ in range(count))


@pytest.fixture
def services() -> Iterator[Services]:
    found = Services()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(202 if self.path == "/pagerduty" else 200)
            self.end_headers()
            self.wfile.write(b"ok")
            found.posted.put((self.path, content))

        def log_message(self, *_: object) -> None: ...

    with http_server(Handler) as address:
        found.url = f"http://{address}"
        yield found


def local_config(folder: Path, url: str, smarthost: str) -> Path:
    """The example, with each service on this machine."""
    config = yaml.safe_load(RECEIVERS.read_text())
    (receiver,) = (each for each in config["receivers"] if each["name"] == "on-call")
    receiver["slack_configs"][0]["api_url"] = f"{url}/slack"
    receiver["pagerduty_configs"][0]["url"] = f"{url}/pagerduty"
    for webhook, path in zip(receiver["webhook_configs"], ("teams", "other"), strict=True):
        webhook["url"] = f"{url}/{path}"
    mail = receiver["email_configs"][0]
    mail |= {"smarthost": smarthost, "require_tls": False}
    del mail["auth_username"], mail["auth_password"]
    config["route"]["group_interval"] = "100ms"
    shutil.copy(TEMPLATE, folder)
    (folder / RECEIVERS.name).write_text(yaml.safe_dump(config))
    return folder / RECEIVERS.name


def test_amtool_accepts_the_receivers_and_their_templates() -> None:
    done = subprocess.run(
        ["amtool", "check-config", RECEIVERS], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 templates" in done.stdout + done.stderr


def test_routes_and_inhibitions_are_those_of_the_other_example() -> None:
    first, second = (yaml.safe_load(path.read_text()) for path in (ALERTMANAGER_CONFIG, RECEIVERS))
    assert second["inhibit_rules"] == first["inhibit_rules"]
    assert json.loads(json.dumps(second["route"]).replace("on-call", "webhook")) == first["route"]


def test_every_service_gets_what_it_asks_for(services: Services, start: Start, tmp_path: Path) -> None:
    with mail_server() as mailbox:
        config = local_config(tmp_path, services.url, mailbox.address)
        address = start_alertmanager(start, config, tmp_path)
        assert cli.notify(["--test", "--alertmanager", f"http://{address}"]) == 0
        posted = services.first(4)
        mail = mailbox.messages.get(timeout=60)
    assert posted.keys() == {"/slack", "/pagerduty", "/teams", "/other"}

    # https://docs.slack.dev/reference/messaging/payload: text, blocks or attachments; of an attachment, the fields of
    # https://docs.slack.dev/legacy/legacy-messaging/legacy-secondary-message-attachments, of which `fallback` is plain.
    (attachment,) = posted["/slack"]["attachments"]
    assert attachment["title"] == attachment["fallback"] == TITLE
    assert attachment["title_link"] == "http://127.0.0.1:9327/"
    assert attachment["text"] == TEXT

    # https://developer.pagerduty.com/docs/send-alert-event: required are routing_key (32 characters), event_action, and
    # of the payload summary (at most 1,024 characters), source and severity, one of four; links have href and text.
    event = posted["/pagerduty"]
    assert (len(event["routing_key"]), event["event_action"]) == (32, "trigger")
    assert event["dedup_key"]
    assert event["payload"]["summary"] == TITLE
    assert event["payload"]["severity"] == "critical"
    assert event["payload"]["source"]
    assert event["payload"]["custom_details"]["text"] == TEXT
    assert event["links"] == [{"href": "http://127.0.0.1:9327/runbooks", "text": "Runbook"}]
    assert (event["client"], event["client_url"]) == ("Foreshock", "http://127.0.0.1:9327/")

    # https://prometheus.io/docs/alerting/latest/configuration/#webhook_config
    for path in ("/teams", "/other"):
        assert posted[path]["version"] == "4"
        assert posted[path]["commonLabels"]["alertname"] == "TestNotification"
        assert [alert["status"] for alert in posted[path]["alerts"]] == ["firing"]

    # RFC 5322: From and Date are required.
    assert (mail["From"], mail["To"]) == ("foreshock@example.org", "on-call@example.org")
    assert mail["Subject"] == TITLE
    assert mail["Date"]
    body = mail.get_body(("plain",))
    assert body is not None
    assert body.get_content().splitlines() == TEXT.splitlines()
    assert mail.get_body(("html",)) is None


def teams_receiver() -> dict[str, Any]:
    """The receiver for Teams that the example has in comments."""
    comments = re.search(r"((?:    #   +.*\n)+)    # Before, and from 0\.26 on", RECEIVERS.read_text())
    assert comments is not None
    receiver: dict[str, Any] = yaml.safe_load(comments[1].replace("    #   ", ""))
    return receiver


def version_of_alertmanager() -> Version:
    done = subprocess.run(["prometheus-alertmanager", "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"version (\d+\.\d+)", done.stdout + done.stderr)
    assert found is not None
    return Version(found[1])


def test_teams_gets_a_card(services: Services, start: Start, tmp_path: Path) -> None:
    if version_of_alertmanager() < Version("0.28"):
        pytest.skip("Alertmanager before 0.28 has no msteamsv2_configs")
    config = yaml.safe_load(RECEIVERS.read_text())
    (receiver,) = (each for each in config["receivers"] if each["name"] == "on-call")
    name = receiver["name"]
    receiver.clear()
    receiver |= {"name": name, **teams_receiver()}
    receiver["msteamsv2_configs"][0]["webhook_url"] = f"{services.url}/teams"
    shutil.copy(TEMPLATE, tmp_path)
    (tmp_path / RECEIVERS.name).write_text(yaml.safe_dump(config))
    address = start_alertmanager(start, tmp_path / RECEIVERS.name, tmp_path)
    assert cli.notify(["--test", "--alertmanager", f"http://{address}"]) == 0
    # https://learn.microsoft.com/en-us/microsoftteams/platform/webhooks-and-connectors/how-to/add-incoming-webhook:
    # a message whose one attachment is an Adaptive Card.
    message = services.first(1)["/teams"]
    (attachment,) = message["attachments"]
    assert (message["type"], attachment["contentType"]) == ("message", "application/vnd.microsoft.card.adaptive")
    card = attachment["content"]
    assert card["type"] == "AdaptiveCard"
    assert [block["text"] for block in card["body"]] == [TITLE, TEXT]


def test_a_run_cannot_mention_a_channel_and_a_resolution_says_so(
    services: Services, start: Start, tmp_path: Path
) -> None:
    with mail_server() as mailbox:
        config = local_config(tmp_path, services.url, mailbox.address)
        address = start_alertmanager(start, config, tmp_path)
        labels = {"alertname": "ForeshockRunDied", "severity": "critical", "experiment": "e", "run": "<!channel> & co"}
        alert = {"labels": labels, "annotations": {"summary": "It died.", "description": "Run <!channel> has died."}}
        request(address, "POST", "/api/v2/alerts", [alert])
        (attachment,) = services.first(4)["/slack"]["attachments"]
        assert attachment["title"] == "CRITICAL ForeshockRunDied: &lt;!channel&gt; &amp; co"
        assert attachment["text"] == "It died. Run &lt;!channel&gt; has died."
        mail = mailbox.messages.get(timeout=60)
        assert mail["Subject"] == "CRITICAL ForeshockRunDied: <!channel> & co"
        request(address, "POST", "/api/v2/alerts", [alert | {"endsAt": "2026-01-01T00:00:00Z"}])
        resolved = services.first(4)
        assert resolved["/pagerduty"]["event_action"] == "resolve"
        assert resolved["/slack"]["attachments"][0]["title"].startswith("RESOLVED ForeshockRunDied")
        assert mailbox.messages.get(timeout=60)["Subject"].startswith("RESOLVED ForeshockRunDied")
