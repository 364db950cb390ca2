"""How the collector's log looks: one line for each event, as text or as JSON.

An event is logged with a mapping as its only argument, `logger.info("%(run)s expired", {"run": name})`: the text shows
what its message names, the JSON line carries every key.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from foreshock_protos.text import escaped

FORMATS = ("text", "json")
_WINDOW_SECONDS = 60.0
_MOST_LINES = 100
_MOST_CHARACTERS = 200
"""Of what aiohttp says of a request, which repeats some of it."""


def configure_logging(log_format: str) -> None:
    """Send all log records of this process to standard error, in one of `FORMATS`."""
    handler = logging.StreamHandler()
    handler.addFilter(WrongRequests())
    handler.addFilter(LineLimit())
    handler.setFormatter({"text": TextFormatter, "json": JsonFormatter}[log_format]())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class WrongRequests(logging.Filter):
    """Makes a warning of one line of what aiohttp logs with a traceback: a request that is no HTTP is no error here."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record, if it is about such a request."""
        error = record.exc_info[1] if record.exc_info else None
        # By its name: the commands that also log must not import aiohttp.
        if record.name == "aiohttp.server" and type(error).__module__ == "aiohttp.http_exceptions":
            peer = record.args[0] if isinstance(record.args, tuple) and record.args else "unknown"
            record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
            record.exc_info = record.exc_text = None
            record.msg = "refused a request of %(peer)s: %(why)s"
            record.args = {"peer": peer, "why": " ".join(str(error).split())[:_MOST_CHARACTERS]}
        return True


class LineLimit(logging.Filter):
    """Lets each place in the code log a hundred lines a minute: whoever sends nonsense must not fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log a record. The last of a window says that others may be left out."""
        place = record.pathname, record.lineno
        began, count = self._windows.get(place, (record.created, 0))
        if not 0 <= record.created - began < _WINDOW_SECONDS:
            began, count = record.created, 0
        self._windows[place] = began, count + 1
        if count + 1 == _MOST_LINES:
            record.msg = f"{record.msg} (further lines of this kind are left out for a minute)"
        return count < _MOST_LINES


class TextFormatter(logging.Formatter):
    """Writes time in UTC, level and message; a traceback follows on lines of its own, indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line, which no name in it can break or color."""
        return escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """Return a traceback: no text in it looks like another line of the log, or colors one."""
        return "\n".join(f"  {escaped(line)}" for line in super().formatException(ei).splitlines())


class JsonFormatter(TextFormatter):
    """Writes one JSON object a line: time, level, logger, message, the event's own keys, and the exception if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, object] = {
            "time": f"{self.formatTime(record, self.datefmt)}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if isinstance(record.args, Mapping):
            line |= {key: value for key, value in record.args.items() if key not in line}
        if record.exc_info:
            line["exception"] = logging.Formatter.formatException(self, record.exc_info)
        return json.dumps(line, default=str)
