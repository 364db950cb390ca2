"""Redirects of an address that the commands ask: followed, but only its own server is shown the token."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from foreshock_collector.commands.client import ask
from tests.support.streams import serving
from tests.support.webhook_receiver import Receiver, receiving


def redirect(url: str) -> web.Response:
    return web.Response(status=302, headers={"Location": url})


async def shown(receiver: Receiver) -> str | None:
    return (await receiver.requests.get())[0].headers.get("Authorization")


def test_a_token_follows_a_redirect_on_its_own_server_and_to_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    monkeypatch.setenv("FORESHOCK_TOKEN_FILE", str(token))

    async def test() -> None:
        async with receiving() as ours, receiving() as other:
            ours.replies = [lambda _: redirect(f"{ours.url}/moved"), lambda _: redirect(f"{other.url}/moved")]
            other.replies = [lambda _: web.Response(text='{"runs": []}')]
            assert await asyncio.to_thread(ask, ours.url, "runs") == {"runs": []}
            assert [await shown(ours), await shown(ours)] == ["Bearer secret"] * 2
            assert await shown(other) is None

    serving(test())
