"""An HTTP server that receives notifications, and answers as the test asks it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Reply = Callable[[web.Request], web.StreamResponse]


class Receiver:
    """Answers one request after the other as it is asked to, then with 200."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.requests: asyncio.Queue[tuple[web.Request, bytes]] = asyncio.Queue()
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        response = self.replies.pop(0)(request) if self.replies else web.Response(text="ok")
        self.requests.put_nowait((request, body))
        return response

    async def next(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((await self.requests.get())[1])
        return found


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", receiver.handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook/s3cret"
    try:
        yield receiver
    finally:
        await runner.cleanup()
