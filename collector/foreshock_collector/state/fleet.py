"""All runs: which run a launch belongs to, and which run an instance is part of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from cachetools import LRUCache

from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.state.errors import Errors, collector_errors
from foreshock_collector.state.instances import Instance
from foreshock_collector.state.runs import ContradictionError, Run
from foreshock_collector.state.summary import RunSummary, summary_at_end
from foreshock_protos.v1 import telemetry_pb2 as pb

ENDED_KEPT = 200
"""Ended runs in memory, the newest ones, at up to a few hundred kilobytes each; the store has them all."""
_COPIES_KEPT = 16
"""Archived runs that were read last: an open page reads its run several times."""


class Archive(Protocol):
    """Stores runs, and returns those that have left memory."""

    def restored(self, run: str, rules_of: Callable[[str], Rules], errors: Errors) -> Run | None:
        """Return a run by its name, as it was committed; None if it cannot be decoded: it is counted and set aside."""

    def run_of(self, instance: str) -> str | None:
        """Return the name of the run that an instance is part of; None if no such instance is stored."""

    def is_set_aside(self, run: str) -> bool:
        """Return whether a run of this name could not be decoded, and is still stored."""


class Runs:
    """Finds every run by name or by instance, and iterates over those in memory.

    rules_of: returns the rules of a run by its name. archive: where ended runs are; None: all stay in memory.
    """

    def __init__(self, rules_of: Callable[[str], Rules] = lambda _: DEFAULT, archive: Archive | None = None) -> None:
        self.rules_of = rules_of
        self.errors = collector_errors()
        """Internal errors that no single run caused."""
        self.archived: dict[str, RunSummary] = {}
        """Ended runs that are in the store alone, by name."""
        self._newest_archived: list[RunSummary] | None = None
        """The archived runs in order; None if it is not known."""
        self._archive = archive
        self._copies: LRUCache[str, Run] = LRUCache(_COPIES_KEPT)
        """Archived runs as they were read, by name."""
        self._runs: dict[str, Run] = {}
        self._instances: dict[str, tuple[Run, Instance]] = {}
        self._launches: dict[tuple[str, str], str] = {}
        """Name of a launch's run, by requested name and launch; also of archived runs."""

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._runs.values()))

    def get(self, name: str) -> Run | None:
        """The run of this name, for reading: of an archived run, a copy."""
        if name not in self.archived:
            return self._runs.get(name)
        if name not in self._copies:
            run = self._from_archive(name)
            if run is None:
                return None
            self._copies[name] = run
        copy: Run = self._copies[name]
        return copy

    def in_memory(self, name: str) -> Run | None:
        """The run of this name, unless it is archived."""
        return self._runs.get(name)

    def experiment_of(self, name: str) -> str | None:
        """The experiment of the run of this name; None if there is no such run."""
        found = self.archived.get(name) or self._runs.get(name)
        return None if found is None else found.experiment

    def find(self, instance: str) -> tuple[Run, Instance] | None:
        """An instance and its run, for writing: an archived run is in memory from now on."""
        if instance not in self._instances and self.archived:
            assert self._archive is not None
            if (name := self._archive.run_of(instance)) in self.archived:
                self._bring_back(name)
        return self._instances.get(instance)

    def find_in_memory(self, instance: str) -> tuple[Run, Instance] | None:
        """An instance and its run, unless that is archived."""
        return self._instances.get(instance)

    def archived_newest_first(self) -> Sequence[RunSummary]:
        """Return the archived runs, the one that reported last at the beginning."""
        if self._newest_archived is None:
            self._newest_archived = sorted(self.archived.values(), key=lambda run: run.last_report, reverse=True)
        return self._newest_archived

    def move_clock(self, seconds: float) -> None:
        """Add so many seconds to each time by this machine's clock, which was set."""
        for run in self._runs.values():
            run.move_clock(seconds)
        for name, summary in self.archived.items():
            last_step = summary.last_step + seconds if summary.last_step else 0.0
            self.archived[name] = replace(summary, last_report=summary.last_report + seconds, last_step=last_step)
        self._newest_archived = None
        self._copies.clear()

    def add(self, run: Run) -> None:
        """Add a run from the store, with its instances."""
        self._runs[run.name] = run
        for attempt in run.attempts:
            self._launches[attempt.hello.run, attempt.launch] = run.name
            for instance in attempt.instances.values():
                self._instances[instance.name] = (run, instance)

    def archive(self, ended: Iterable[Run]) -> list[Run]:
        """Free all but the newest of these runs, which are over. Return those that stay in memory."""
        newest_first = sorted(ended, key=Run.last_report, reverse=True)
        if self._archive is None:
            return newest_first
        for run in newest_first[ENDED_KEPT:]:
            summary = run.errors.value("page", None, summary_at_end, run)
            if summary is None:
                continue  # a run that no list can show stays where its errors are seen
            del self._runs[run.name]
            for attempt in run.attempts:
                for instance in attempt.instances.values():
                    del self._instances[instance.name]
            self.archived[run.name] = summary
            self._newest_archived = None
        return newest_first[:ENDED_KEPT]

    def _bring_back(self, name: str) -> Run | None:
        """Return a run for writing; None if there is no such run, or it is archived and cannot be decoded."""
        if name not in self.archived:
            return self._runs.get(name)
        run = self._from_archive(name)
        if run is not None:
            self._remove_archived(name)
            self.add(run)
        return run

    def _from_archive(self, name: str) -> Run | None:
        assert self._archive is not None
        run = self._archive.restored(name, self.rules_of, self.errors)
        if run is None:
            self._remove_archived(name)
            self._launches = {launch: of for launch, of in self._launches.items() if of != name}
            return None
        # The clock may have been set since it was stored.
        run.move_clock(self.archived[name].last_report - run.last_report())
        return run

    def _remove_archived(self, name: str) -> None:
        del self.archived[name]
        self._newest_archived = None
        self._copies.pop(name, None)

    def begins_run(self, hello: pb.Hello) -> bool:
        """Return whether a hello is the first of a launch, and so begins a run or brings one back."""
        return (hello.run, hello.launch_id) not in self._launches

    def register(self, hello: pb.Hello, now: float, *, host: str = "") -> Instance:
        """Return the instance of a hello; create it, and its run, if they are new. Raises `ContradictionError`.

        host: address of the machine that sends it.
        """
        known = self.find(hello.instance)
        if known is not None:
            run, instance = known
            first = run.attempts[instance.attempt].hello
            before = (first.experiment, first.run, first.launch_id, instance.rank)
            if before != (hello.experiment, hello.run, hello.launch_id, hello.topology.rank):
                raise ContradictionError("this instance has given another experiment, run, launch or rank before")
            if not instance.is_sent_by(hello):
                raise ContradictionError("this instance has given another token before")
            run.heartbeat(instance, now)
            instance.gone |= hello.exited
            return instance
        run = self._run_of(hello, now)
        run.host = run.host or host
        instance = run.register(hello, now)
        self._runs[run.name] = run
        self._launches[hello.run, hello.launch_id] = run.name
        self._instances[instance.name] = (run, instance)
        return instance

    def _run_of(self, hello: pb.Hello, now: float) -> Run:
        """Return the run of a launch, which its first hello decides for all its ranks.

        A launch is the next attempt of the run whose name it asks for. If that run still has live ranks, or belongs to
        another experiment, or was set aside, the launch becomes a separate run: name-2, name-3 and so on.
        """
        name = self._launches.get((hello.run, hello.launch_id))
        run = None if name is None else self._bring_back(name)
        if run is not None:
            if run.experiment != hello.experiment:
                raise ContradictionError(
                    f"experiment {hello.experiment!r}: this launch has reported {run.experiment!r} before"
                )
            return run
        for number in itertools.count(1):
            name = hello.run if number == 1 else f"{hello.run}-{number}"
            if name in self.archived and self.archived[name].experiment != hello.experiment:
                continue
            run = self._bring_back(name)
            if run is None and self._archive is not None and self._archive.is_set_aside(name):
                continue
            if run is None:
                return Run(hello.experiment, name, self.rules_of(hello.run))
            if run.experiment != hello.experiment:
                continue
            if number > 1 and run.attempts[0].hello.run != hello.run:
                continue  # a launch asked for this very name: it is unrelated
            # Records that are handed in after the rank exited compete with no live run.
            if hello.exited or not run.has_live_ranks(now):
                return run
        raise AssertionError
