"""How the collector's log looks: one line for each event, as text or as JSON.

An event is logged with a mapping as its only argument, `logger.info("%(run)s expired", {"run": name})`: the text shows
what its message names, the JSON line carries every key.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping

from foreshock_protos.text import escaped

FORMATS = ("text", "json")
_WINDOW_SECONDS = 60.0
_MOST_LINES = 100


def configure_logging(log_format: str) -> None:
    """Send all log records of this process to standard error, in one of `FORMATS`."""
    handler = logging.StreamHandler()
    handler.addFilter(LineLimit())
    handler.setFormatter({"text": TextFormatter, "json": JsonFormatter}[log_format]())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


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
    """Writes time in UTC, level and message; a traceback follows on lines of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line, which no name in it can break or color."""
        return escaped(super().formatMessage(record))


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
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
