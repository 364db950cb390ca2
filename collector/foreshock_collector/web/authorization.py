"""Which requests need a token, and what it must be for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web

from foreshock_collector.access.tokens import Tokens, secret_in
from foreshock_collector.state.fleet import Runs

_OPEN = ("/-/healthy", "/-/ready")
"""Paths that show nothing of any run."""
_LIVE = "/api/v1/live"
_OF_ALL_RUNS = ("/metrics", "/api/v1/runs", _LIVE)
"""Paths that show runs of all experiments. Only the changes can be asked for of one run; the others ignore a query."""
_ASK = {"WWW-Authenticate": 'Basic realm="foreshock", charset="UTF-8"'}
"""Makes a browser ask for a password: the token, with any user name."""


def token_required(tokens: Tokens, runs: Runs) -> Any:
    """Return a middleware that answers only to tokens with the right to read, each for its own experiments."""

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path not in _OPEN:
            token = tokens.find(secret_in(request.headers.get("Authorization", "")), "read")
            if token is None:
                raise web.HTTPUnauthorized(text="a token with the right to read is required\n", headers=_ASK)
            name = request.query.get("run", "") if request.path == _LIVE else request.match_info.get("run", "")
            experiment = runs.experiment_of(name) if name else None
            # A stream of changes would go on into the run that is given the name later, whoever's it is.
            of_all = request.path in _OF_ALL_RUNS and experiment is None
            if not token.allows_all and (of_all or (experiment is not None and not token.allows(experiment))):
                raise web.HTTPForbidden(text=f"this token is for experiments {token.experiment!r} only\n")
        response: web.StreamResponse = await handler(request)
        return response

    return check


def validity(request: web.Request, tokens: Tokens | None) -> Callable[[], bool]:
    """Return a function that returns whether the token of an accepted request is still valid."""
    if tokens is None:
        return lambda: True
    token = tokens.find(secret_in(request.headers.get("Authorization", "")), "read")
    return lambda: token is not None and tokens.is_valid(token)
