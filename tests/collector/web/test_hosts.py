"""A site that leads its own name to this machine must not read the collector by a browser here."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from foreshock_collector.server import Server
from foreshock_collector.web.hosts import host_of
from tests.support.streams import config, serving

PATHS = ("/metrics", "/api/v1/runs", "/api/v1/live", "/-/ready", "/", "/nowhere")


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("localhost:9327", "localhost"),
        ("[::1]:9327", "::1"),
        ("[::1]", "::1"),
        ("Monitor.Example.ORG.", "monitor.example.org"),
        ("", ""),
    ],
)
def test_the_host_of_a_request_is_known_whatever_its_port(header: str, host: str) -> None:
    assert host_of(header) == host


def test_a_collector_on_localhost_answers_to_its_own_names_only(tmp_path: Path) -> None:
    async def test() -> None:
        settings = config(tmp_path, public_url="https://monitor.example.org/foreshock")
        async with Server(settings) as server, aiohttp.ClientSession() as session:
            for path in PATHS:
                for host in ("attacker.example", "localhost.attacker.example", "127.0.0.1.attacker.example"):
                    async with session.get(server.url + path, headers={"Host": host}) as response:
                        assert response.status == 403, (path, host)
                        assert "--public-url" in await response.text()
            for host in ("localhost:1", "127.0.0.1", "[::1]:9327", "192.0.2.7", "monitor.example.org"):
                async with session.get(f"{server.url}/-/ready", headers={"Host": host}) as response:
                    assert response.status == 200, host

    serving(test())


def test_a_collector_that_any_machine_may_read_answers_to_any_name(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path, host="0.0.0.0", allow_unauthenticated=True)) as server:
            url = f"http://127.0.0.1:{server.http_port}/-/ready"
            async with aiohttp.ClientSession() as session, session.get(url, headers={"Host": "collector"}) as response:
                assert response.status == 200

    serving(test())
