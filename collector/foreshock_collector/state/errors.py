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
    """Those of one run, or of what serves all of them. counts: by stage, from 0 on."""

    def __init__(self, whose: str, stages: Sequence[str]) -> None:
        self.counts = dict.fromkeys(stages, 0)
        self._whose = whose
        self._logged: set[tuple[object, ...]] = set()

    def add(self, stage: str, error: Exception, about: str = "") -> None:
        """Count it. The first of its kind, and of what it is about, goes to the log, with its traceback."""
        self.counts[stage] += 1
        kind = stage, about, type(error), _place(error)
        if kind not in self._logged:
            self._logged.add(kind)
            logger.error(
                "%s: %s failed; nothing else stops for it. More of this kind are only counted.",
                about or self._whose,
                stage,
                exc_info=error,
            )

    @contextmanager
    def caught(self, stage: str) -> Iterator[None]:
        """What fails inside is counted, and the code behind it goes on."""
        try:
            yield
        except Exception as error:
            self.add(stage, error)

    def value(self, stage: str, otherwise: _T, function: Callable[..., _T], *arguments: Any) -> _T:
        """What the function returns; otherwise, where it fails."""
        try:
            return function(*arguments)
        except Exception as error:
            self.add(stage, error)
            return otherwise

    def shown(self) -> dict[str, int]:
        """Those stages that have failed."""
        return {stage: count for stage, count in self.counts.items() if count}


def collector_errors() -> Errors:
    """Of what serves all runs."""
    return Errors("the collector", COLLECTOR_STAGES)


def _place(error: Exception) -> tuple[str, int] | None:
    """Where it came up."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace and (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
