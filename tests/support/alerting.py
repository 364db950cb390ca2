"""Real Prometheus and Alertmanager processes on ports of their own choice, and a webhook that hears the latter."""

from __future__ import annotations

import http.client
import json
import queue
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import urlopen

import yaml

from foreshock_protos import DEFAULT_HTTP_PORT
from tests.support.repository import ROOT
from tests.support.waiting import eventually
from tests.support.yaml_text import parsed

RULES = ROOT / "deploy/prometheus/foreshock.rules.yml"
PROMETHEUS_CONFIG = ROOT / "deploy/prometheus/prometheus.yml"
ALERTMANAGER_CONFIG = ROOT / "deploy/alertmanager/alertmanager.yml"
ALERTS: list[dict[str, Any]] = [rule for group in parsed(RULES.read_text())["groups"] for rule in group["rules"]]
SEVERITY: dict[str, str] = {alert["alert"]: alert["labels"]["severity"] for alert in ALERTS}
LISTENING = re.compile(r'msg="Listening on" (?:component=web )?address=(127\.0\.0\.1:\d+)')

Start = Callable[..., str]
Notification = tuple[str, str, str]
"""Status, alert name and run."""


class Webhook:
    """What Alertmanager told, in the order of arrival, each with its time."""

    def __init__(self) -> None:
        self.alerts: queue.Queue[dict[str, Any]] = queue.Queue()
        self.url = ""

    def next(self) -> dict[str, Any]:
        return self.alerts.get(timeout=60)


@contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on a free port of this machine; gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def request(address: str, method: str, path: str, body: object = None) -> Any:
    """One JSON request to a server of this machine."""
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        assert response.status == 200, text
        return json.loads(text) if text else None
    finally:
        connection.close()


def name_and_run(alert: dict[str, Any]) -> Notification:
    return alert["status"], alert["labels"]["alertname"], alert["labels"].get("run", "")


def seconds(duration: str) -> int:
    assert duration.endswith("s")
    return int(duration.removesuffix("s"))


def with_receiver(url: str, folder: Path, *, faster: int = 10, inhibit: bool = True) -> Path:
    """The example, with our webhook and with waits so many times as short."""
    config = parsed(ALERTMANAGER_CONFIG.read_text())
    config["receivers"][0]["webhook_configs"][0]["url"] = url
    for route in (config["route"], *config["route"]["routes"]):
        if "group_wait" in route:
            route["group_wait"] = f"{seconds(route['group_wait']) * 1000 // faster}ms"
    if not inhibit:
        del config["inhibit_rules"]
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
    return folder / "alertmanager.yml"


def faster(folder: Path, collector: str, alertmanager: str) -> Path:
    """The shipped files, every second instead of every five, pointed at this test's processes, links included."""
    config = parsed(PROMETHEUS_CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [collector]
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    config["rule_files"] = [str(folder / RULES.name)]
    (folder / RULES.name).write_text(
        RULES.read_text().replace(f"http://127.0.0.1:{DEFAULT_HTTP_PORT}", f"http://{collector}")
    )
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    return folder / "prometheus.yml"


def start_alertmanager(start: Start, config: Path, folder: Path) -> str:
    return start(
        "prometheus-alertmanager",
        f"--config.file={config}",
        "--web.listen-address=127.0.0.1:0",
        "--cluster.listen-address=",
        f"--storage.path={folder / 'alertmanager'}",
    )


def start_prometheus(start: Start, config: Path, folder: Path) -> str:
    """Its address, once it answers queries: it listens before that."""
    address = start(
        "prometheus",
        f"--config.file={config}",
        "--web.listen-address=127.0.0.1:0",
        f"--storage.tsdb.path={folder / 'prometheus'}",
    )

    def ready() -> bool:
        with suppress(HTTPError), urlopen(f"http://{address}/-/ready", timeout=30):
            return True
        return False

    eventually(ready, "a Prometheus that is ready")
    return address


@contextmanager
def listening() -> Iterator[Webhook]:
    """A webhook for as long as the block lasts."""
    heard = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for alert in message["alerts"]:
                heard.alerts.put({**alert, "heard_seconds": time.time()})
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http_server(Handler) as address:
        heard.url = f"http://{address}/"
        yield heard


@contextmanager
def programs() -> Iterator[Start]:
    """Starts a program that says where it listens; all are stopped and their output read to the end afterwards."""
    running: list[tuple[subprocess.Popen[str], threading.Thread]] = []

    def starting(*command: str | Path) -> str:
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            if found := LISTENING.search(line):
                reader = threading.Thread(target=_drain, args=(process.stderr,))
                reader.start()
                running.append((process, reader))
                return found[1]
        raise AssertionError(f"{command[0]} ended with {process.wait()}:\n{''.join(said)}")

    try:
        yield starting
    finally:
        for process, reader in reversed(running):
            process.terminate()
            process.wait(timeout=30)
            reader.join()
            assert process.stderr is not None
            process.stderr.close()


def _drain(stream: IO[str]) -> None:
    for _ in stream:
        pass
