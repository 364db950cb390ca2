"""The collector's internal errors. One in a run affects that run alone: counted, and logged once a kind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from foreshock_collector.catalogue import COLLECTOR_STAGES

_T = TypeVar("_T")
logger = logging.getLogger(__name__)


class Errors:
    """Counts the errors of one run, or of what serves all runs, and logs the first of each kind."""

    def __init__(self, subject: str, stages: Sequence[str]) -> None:
        self.counts = dict.fromkeys(stages, 0)
        """By stage; each exists at 0 from the start."""
        self._subject = subject
        self._logged: set[tuple[object, ...]] = set()

    def add(self, stage: str, error: Exception, subject: str = "") -> None:
        """Count an error. The first of its kind and subject is logged with its traceback."""
        self.counts[stage] += 1
        subject = subject or self._subject
        kind = stage, subject, type(error), _origin(error)
        if kind not in self._logged:
            self._logged.add(kind)
            facts = {"subject": subject, "stage": stage, "error": str(error)}
            text = "%(subject)s: %(stage)s failed; the rest continues, and further errors of this kind are only counted"
            logger.error(text, facts, exc_info=error)

    @contextmanager
    def caught(self, stage: str) -> Iterator[None]:
        """Count an error that is raised inside, and let the code after the block go on."""
        try:
            yield
        except Exception as error:
            self.add(stage, error)

    def value(self, stage: str, default: _T, function: Callable[..., _T], *arguments: Any) -> _T:
        """Return what the function returns, or the default if it fails."""
        try:
            return function(*arguments)
        except Exception as error:
            self.add(stage, error)
            return default

    def nonzero(self) -> dict[str, int]:
        """Return the counts of the stages that have failed."""
        return {stage: count for stage, count in self.counts.items() if count}


def collector_errors() -> Errors:
    """Return a count of errors that no single run has caused."""
    return Errors("the collector", COLLECTOR_STAGES)


def _origin(error: Exception) -> tuple[str, int] | None:
    """Return the file and line that raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace and (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
