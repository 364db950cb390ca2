"""Tokens, each bound to experiments and to a right. The file has their hashes, never the tokens."""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import hmac
import logging
import re
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from foreshock_collector.access.watched_file import WatchedFiles

logger = logging.getLogger(__name__)

Right = Literal["write", "read"]
RIGHTS: tuple[Right, ...] = ("write", "read")
_KEYS = {"name", "sha256", "experiment", "rights", "expires"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


class TokensError(ValueError):
    """The file of tokens is wrong; the text says where and how."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """Describes what the holder of one token may do."""

    name: str = field(compare=False)
    """For people: renaming a token changes nothing of it."""
    digest: bytes
    """SHA-256 of the token."""
    experiment: str
    """Pattern of the experiments that it is for, such as "vision-*"; "*" is all."""
    rights: tuple[Right, ...]
    expires: float
    """Unix time; Inf: never."""

    def allows(self, experiment: str) -> bool:
        """Return whether it is for this experiment."""
        return fnmatchcase(experiment, self.experiment)

    @property
    def allows_all(self) -> bool:
        """Whether it is for all experiments."""
        return self.experiment == "*"


class Tokens:
    """Finds the token that a client shows. Raises `TokensError` for a wrong file at the start.

    Reads the file again when it changes; while it is wrong then, the tokens before it stay valid. clock: Unix time.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._clock = clock
        self._file = WatchedFiles(path, monotonic=monotonic)
        self._tokens = read_tokens(path)

    def find(self, secret: str, right: Right) -> Token | None:
        """Return the token, if it exists, has the right and has not expired."""
        if self._file.changed():
            self._read_again()
        # aiohttp turns bytes of a header that are no UTF-8 into surrogates.
        digest = hashlib.sha256(secret.encode(errors="surrogatepass")).digest()
        # All are compared, so that the time that it takes says nothing about them.
        found = [token for token in self._tokens if hmac.compare_digest(token.digest, digest)]
        return next((each for each in found if right in each.rights and self._clock() < each.expires), None)

    def is_valid(self, token: Token) -> bool:
        """Return whether a token that was found before is still in the file, unchanged, and has not expired."""
        if self._file.changed():
            self._read_again()
        return token in self._tokens and self._clock() < token.expires

    def _read_again(self) -> None:
        try:
            self._tokens = read_tokens(self._path)
        except TokensError as error:
            logger.error("%(error)s; the tokens before the change stay valid", {"error": str(error)})
        else:
            logger.info("read %(count)d tokens from %(path)s", {"count": len(self._tokens), "path": str(self._path)})


def secret_in(authorization: str) -> str:
    """Return the token in an Authorization header: Bearer, or Basic with the token as password; empty without one."""
    scheme, _, value = authorization.strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return ""
    return ""


def read_tokens(path: Path) -> list[Token]:
    """Read a file of tokens. Raises `TokensError`."""
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TokensError(f"tokens {path}: {error}") from error
    tables = content.pop("tokens", None)
    if content or not isinstance(tables, list) or not tables:
        raise TokensError(f"tokens {path}: it must be a list of [[tokens]] and nothing else")
    return [_token(f"tokens {path}: number {number}", table) for number, table in enumerate(tables, 1)]


def _token(where: str, table: Mapping[str, Any]) -> Token:
    if unknown := table.keys() - _KEYS:
        raise TokensError(f"{where}: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(_KEYS))}")
    digest, rights = table.get("sha256", ""), table.get("rights", [])
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise TokensError(f"{where}: sha256 must be 64 hexadecimal digits in lower case")
    if not isinstance(rights, list) or not rights or not all(right in RIGHTS for right in rights):
        raise TokensError(f"{where}: rights must be a list of {' and '.join(RIGHTS)}")
    name, experiment = table.get("name", ""), table.get("experiment", "")
    if not (isinstance(name, str) and name and isinstance(experiment, str) and experiment):
        raise TokensError(f'{where}: name and experiment must be texts; experiment = "*" is all')
    return Token(
        name=name,
        digest=bytes.fromhex(digest),
        experiment=experiment,
        rights=tuple(rights),
        expires=_expiry(where, table.get("expires")),
    )


def _expiry(where: str, value: object) -> float:
    if value is None:
        return float("inf")
    if isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()
    if isinstance(value, datetime.date):
        return datetime.datetime(value.year, value.month, value.day, tzinfo=datetime.UTC).timestamp()
    raise TokensError(f"{where}: expires must be a date, such as 2027-01-31")
