"""How long the steps of runs are kept: for weeks, and within a size that cannot fill a disk. Incidents stay."""

from __future__ import annotations

import logging
from collections.abc import Callable

from foreshock_collector.state.attempts import WINDOW_STEPS
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.runs import Run
from foreshock_collector.state.store import Store

logger = logging.getLogger(__name__)


class Retention:
    """Deletes the oldest steps of a store, some at a time.

    seconds: for which the steps of an ended run are kept. most_bytes: size of the database above which even steps that
    are newer are deleted: first the runs that were set aside, then the steps of the run that reported longest ago.
    silent: seconds without a report that end a run.
    """

    def __init__(self, store: Store, *, seconds: float, most_bytes: float, silent: float) -> None:
        self._store = store
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._silent = silent
        self._emptied: dict[str, int] = {}
        """Runs without a step that could be deleted, and the steps that they had made by then."""

    def delete_some(self, runs: Runs, now: float) -> None:
        """Delete steps that are due, of one run. now: Unix time. Raises `sqlite3.Error`."""
        archived = runs.archived_newest_first()[::-1]
        oldest = sorted((run for run in runs if run.attempts), key=Run.last_report)
        for run in archived:
            if now - run.last_report > self._seconds and self._delete_archived(run.run, run.steps):
                return
        for each in oldest:
            if each.ended_for(now, self._silent) > self._seconds and self._delete(each):
                return
        if self._store.used_bytes() <= self._most_bytes or self._store.delete_set_aside():
            return
        if not any(self._delete_archived(run.run, run.steps) for run in archived):
            any(self._delete(each) for each in oldest)

    def _delete_archived(self, name: str, made: int) -> bool:
        return self._delete_from(name, made, lambda: self._store.delete_archived_steps(name))

    def _delete(self, run: Run) -> bool:
        keep = 0 if run.evicted else WINDOW_STEPS
        return self._delete_from(run.name, run.totals.steps, lambda: self._store.delete_steps(run, keep=keep))

    def _delete_from(self, name: str, made: int, delete: Callable[[], int]) -> bool:
        """Delete some of a run's steps. Return whether there were any. made: steps that it has made."""
        if self._emptied.get(name) == made:
            return False
        if delete():
            return True
        self._emptied[name] = made
        logger.info("the oldest steps of run %(run)s were deleted; its incidents stay", {"run": name})
        return False
