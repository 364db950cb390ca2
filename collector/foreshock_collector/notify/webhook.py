"""One POST of a message to its receiver."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import aiohttp

from foreshock_collector.notify.message import SIGNATURE_HEADER, signature

_SECONDS = 10.0
"""For one attempt. Slow relays take a second or two; messages about other runs wait meanwhile."""
_ANSWER_BYTES = 4096
_SHOWN = 200
"""Characters of an answer that are logged."""
_TRY_AGAIN = frozenset((408, 425, 429))
"""Statuses below 500 after which another attempt may succeed: timeout, too early, too many requests."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Describes how an attempt ended."""

    status: int
    """HTTP status; 0 if there was no answer."""
    text: str
    """The beginning of the answer, or why there was none."""
    retry_seconds: float = 0.0
    """After which the receiver asks to try again; 0: it does not."""

    @property
    def accepted(self) -> bool:
        """Whether the receiver has the message."""
        return 200 <= self.status < 300

    @property
    def final(self) -> bool:
        """Whether another attempt would end in the same way."""
        return self.accepted or (0 < self.status < 500 and self.status not in _TRY_AGAIN)

    def __str__(self) -> str:
        return f"HTTP {self.status} {self.text}".strip() if self.status else self.text


class Webhook:
    """Posts to one address. secret: signs the bodies; None: they are not signed."""

    def __init__(self, session: aiohttp.ClientSession, url: str, secret: bytes | None) -> None:
        self._session = session
        self._url = url
        self._secret = secret

    @property
    def host(self) -> str:
        """Where the address points, without its path and user: services put their secrets there."""
        parts = urllib.parse.urlsplit(self._url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    async def post(self, body: bytes, now: float) -> Answer:
        """Make one attempt. now: Unix time. A redirection counts as a refusal: its target may be anyone's."""
        headers = {"Content-Type": "application/json"}
        if self._secret is not None:
            headers[SIGNATURE_HEADER] = signature(self._secret, body, now)
        try:
            async with self._session.post(self._url, data=body, headers=headers, allow_redirects=False) as response:
                text = (await response.content.read(_ANSWER_BYTES)).decode("utf-8", "replace")
                return Answer(
                    status=response.status,
                    text=_printable(self._hidden(text))[:_SHOWN],
                    retry_seconds=seconds_until(response.headers.get("Retry-After", ""), now),
                )
        except TimeoutError:
            return Answer(status=0, text=f"no answer within {_SECONDS:g} seconds")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # Its text may contain the address: the kind of error says enough.
            reason = error.strerror if isinstance(error, OSError) and error.strerror else ""
            if isinstance(error, aiohttp.ClientHttpProxyError):
                reason = f"HTTP {error.status}"
            return Answer(status=0, text=f"{type(error).__name__} {reason}".strip())

    def _hidden(self, text: str) -> str:
        """Return an answer without the address's path and query: many servers repeat them where they find nothing."""
        parts = urllib.parse.urlsplit(self._url)
        for secret in (parts.path, parts.query):
            if len(secret) > 1:
                text = text.replace(secret, "...")
        return text


@asynccontextmanager
async def webhook(url: str, secret: bytes | None) -> AsyncIterator[Webhook]:
    """Open a client for as long as the block lasts. It keeps no cookies.

    It uses the proxies of the environment: unlike a collector, a receiver is often outside the network.
    """
    timeout = aiohttp.ClientTimeout(total=_SECONDS)
    cookies = aiohttp.DummyCookieJar()
    async with aiohttp.ClientSession(timeout=timeout, cookie_jar=cookies, trust_env=True) as session:
        yield Webhook(session, url, secret)


def seconds_until(retry_after: str, now: float) -> float:
    """Return the seconds that a Retry-After header asks to wait, which has them or a date; 0 if it has neither."""
    if re.fullmatch("[0-9]{1,9}", retry_after):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - now)
    except (ValueError, OverflowError):
        return 0.0


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text).strip()
