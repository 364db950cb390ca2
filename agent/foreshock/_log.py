"""The logger `foreshock`: few lines, each problem once, on standard error unless the script configures logging.

A script routes, formats or silences them as it does those of any other library. They have level INFO or WARNING, and
the logger's own level is INFO unless the script has set another.
"""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

logger = logging.getLogger("foreshock")
if logger.level == logging.NOTSET:
    # The root's default, WARNING, would hide the address of the run's page.
    logger.setLevel(logging.INFO)


class _StderrHandler(logging.Handler):
    """Writes to standard error as it is at that moment. Where it is closed or gone, the line is lost."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError, AttributeError), _progress_bars_cleared():
            sys.stderr.write(f"foreshock: {record.getMessage()}\n")
            sys.stderr.flush()


def _progress_bars_cleared() -> AbstractContextManager[None]:
    """Return what clears the progress bars of tqdm, on whose line a line of ours would end up, and draws them again."""
    tqdm: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
    # Without tqdm's lock: whoever holds it may be slow, or gone.
    return nullcontext() if tqdm is None else tqdm.external_write_mode(file=sys.stderr, nolock=True)


_stderr = _StderrHandler()
_logged: set[str] = set()
"""Keys of the problems that this process has logged."""
_rank: int | None = None
"""The lowest that this process has in the groups it has attached in; None before the first attach."""


def set_rank(rank: int) -> None:
    """Remember the rank of this process: from now on, lines that all ranks would log alike are those of rank 0."""
    global _rank
    _rank = rank if _rank is None else min(rank, _rank)


def info(line: str) -> None:
    """Log one line."""
    _log(logging.INFO, line)


def info_once(key: str, line: str) -> None:
    """Log one line, unless this process has already logged one about `key`."""
    _log_once(logging.INFO, key, line)


def warn_once(key: str, line: str) -> None:
    """Log one warning, unless this process has already logged one about `key`."""
    _log_once(logging.WARNING, key, line)


def rank_zero_info_once(key: str, line: str) -> None:
    """Log what every rank sees alike: on rank 0, and once."""
    if not _rank:
        info_once(key, line)


def rank_zero_warn_once(key: str, line: str) -> None:
    """Warn of what every rank sees alike, such as a habit of the script: on rank 0, and once."""
    if not _rank:
        warn_once(key, line)


def _log_once(level: int, key: str, line: str) -> None:
    if key not in _logged:
        _logged.add(key)
        _log(level, line)


def _log(level: int, line: str) -> None:
    if not logger.isEnabledFor(level):
        return
    # A handler of the script's may raise, and one whose stream is closed does: training continues all the same.
    with suppress(Exception):
        if logger.hasHandlers():
            logger.log(level, "%s", line)
        elif logger.filter(record := logger.makeRecord(logger.name, level, __file__, 0, "%s", (line,), None)):
            _stderr.emit(record)


def rank_zero_info(line: str, *, rank: int) -> None:
    """Log one line if this is rank 0 of its group."""
    if rank == 0:
        info(line)
