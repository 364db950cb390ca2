"""The API as JSON: runs, their steps and records, incidents. What the page shows comes from here."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from aiohttp import web

from foreshock_collector.state.attempts import Attempt
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.runs import Run
from foreshock_collector.state.store import Store
from foreshock_collector.state.summary import RunSummary, summary_of
from foreshock_collector.web import heat
from foreshock_collector.web.answers import attempt_answer, event_answer, incident_answer, rank_answer, summary_answer
from foreshock_collector.web.baseline import Baselines
from foreshock_collector.web.downsampling import Downsampler
from foreshock_collector.web.sparklines import Sparklines

RUN = "{run:[^/]+}"
"""In a route: any name, percent-encoded. A bare {run} leaves out names with braces."""
_SHORT_LIST = 1000
"""Most runs in a list that is encoded at once, in some tens of milliseconds; a longer one is encoded in a thread."""
_MOST_STEPS = 10_000
_MOST_RANK_COLUMNS = 64
"""Most ranks for which the steps carry local norms."""
_MOST_POINTS = 2000
_NO_END = 2**53
"""Beyond any sequence number; up to here JavaScript has all whole numbers exactly."""


class Api:
    """Answers requests under /api/v1."""

    def __init__(self, *, runs: Runs, store: Store, clock: Callable[[], float], silent: float) -> None:
        self._runs = runs
        self._store = store
        self._clock = clock
        self._silent = silent
        self._baselines = Baselines(store)
        self._downsampler = Downsampler(store)
        self._sparklines = Sparklines(store)

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [
            web.get("/api/v1/runs", self._list),
            web.get(f"/api/v1/runs/{RUN}", self._run),
            web.get(f"/api/v1/runs/{RUN}/steps", self._steps),
            web.get(f"/api/v1/runs/{RUN}/series", self._series),
            web.get(f"/api/v1/runs/{RUN}/heat/{{by:ranks|layers|updates}}", self._heat),
            web.get(f"/api/v1/runs/{RUN}/incidents/{{id}}", self._incident),
        ]

    async def _list(self, request: web.Request) -> web.Response:
        """Return all active runs, and ended runs: at most `ended`, that reported within `ended_within` seconds."""
        now = self._clock()
        summaries = sorted(map(self._summary_or_unknown, self._runs), key=_last_report, reverse=True)
        ended, archived = [each for each in summaries if not each.active], self._runs.archived_newest_first()
        seconds = query_number(request, "ended_within", _NO_END)
        in_order = heapq.merge(ended, archived, key=_last_report, reverse=True)
        newest = itertools.islice(in_order, query_number(request, "ended", _NO_END))
        shown = [each for each in summaries if each.active]
        shown += itertools.takewhile(lambda each: now - each.last_report < seconds, newest)
        shown.sort(key=_last_report, reverse=True)
        briefs = [summary_answer(each) for each in shown]
        if query_number(request, "recent", 0):
            runs = [self._runs.in_memory(each.run) for each in shown]
            for brief, run, columns in zip(briefs, runs, self._sparklines.points(runs), strict=True):
                brief["recent"] = columns
                incidents = [] if run is None else run.incidents.kept
                brief["open_incidents"] = [incident_answer(each) for each in incidents if each.closed_seconds is None]
        answer = {"now_seconds": now, "ended": len(ended) + len(archived), "runs": briefs}
        return json_response(answer) if len(briefs) <= _SHORT_LIST else await asyncio.to_thread(json_response, answer)

    async def _run(self, request: web.Request) -> web.Response:
        run = self._find(request)
        attempt = run.newest
        model, optimizer = attempt.model, attempt.hello.optimizer
        ranks = sorted(attempt.instances.values(), key=lambda instance: (instance.reporting, instance.rank))
        # Those that do not report stand at the beginning: a limit leaves out healthy ones.
        ranks = ranks[: query_number(request, "ranks", len(ranks))]
        return json_response(
            {
                **summary_answer(summary_of(run, self._clock(), self._silent)),
                "now_seconds": self._clock(),
                "counters": {**run.totals.counters, "nonfinite": run.totals.nonfinite, "dropped": run.totals.dropped},
                "attempts": [attempt_answer(each) for each in run.attempts],
                "ranks": [rank_answer(instance) for instance in sorted(ranks, key=lambda instance: instance.rank)],
                "events": [event_answer(each) for each in run.events.kept],
                "incidents": [incident_answer(each) for each in run.incidents.kept],
                "model": {
                    "type": model.type,
                    "module_types": model.module_types,
                    "parameters": len(model.parameters),
                    "elements": sum(model.parameter_sizes),
                    "layers": model.layers,
                },
                "optimizer": {"type": optimizer.type, "fused": optimizer.fused},
                "clip": attempt.hello.clip,
                "versions": dict(attempt.hello.versions),
            }
        )

    async def _steps(self, request: web.Request) -> web.Response:
        run = self._find(request)
        attempt = _attempt_of(request, run)
        after = query_number(request, "after", 0)
        limit = min(query_number(request, "limit", 1000), _MOST_STEPS)
        columns = self._store.steps(run.name, attempt=attempt.number, after=after, limit=limit)
        norms = _local_norms(attempt, columns["sequence"])
        return json_response({"attempt": attempt.number, **columns, "local_norm": norms})

    async def _series(self, request: web.Request) -> web.Response:
        """Return steps for a chart: about `points` bins, the step with the largest norm in each, and the baseline."""
        run = self._find(request)
        attempt = _attempt_of(request, run)
        points = max(1, min(query_number(request, "points", 1000), _MOST_POINTS))
        first, last = (
            max(1, query_number(request, "first", 1)),
            min(attempt.finalized, query_number(request, "last", _NO_END)),
        )
        bin_width, columns = await self._downsampler.bins(
            run.name, attempt.number, first=first, last=last, points=points
        )
        baseline = await self._baselines.replayed(
            run.name, attempt.number, max(columns["sequence"], default=0), run.rules, attempt.inherited
        )
        facts = {"attempt": attempt.number, "newest": attempt.finalized, "bin_width": bin_width}
        return json_response({**facts, **columns, **baseline.at(columns["sequence"])})

    async def _heat(self, request: web.Request) -> web.Response:
        """Return norms by rank or layer, or updates by layer, the largest in each bin; of an evicted attempt, those
        around an incident.
        """
        run = self._find(request)
        attempt = _attempt_of(request, run)
        by = request.match_info["by"]
        columns = max(1, min(query_number(request, "columns", 240), _MOST_POINTS))
        first, last = query_number(request, "first", 1), query_number(request, "last", _NO_END)
        if not attempt.evicted:
            found = heat.newest_norms(attempt, by, first=first, last=last, columns=columns)
            return json_response({"attempt": attempt.number, "kept": "newest", **found})
        numbers = [each.number for each in run.incidents.kept if each.attempt == attempt.number]
        windows = (self._store.incident_window(run.name, number) for number in reversed(numbers))
        window = next((window for window in windows if window is not None), None)
        found = heat.incident_norms(window, attempt.model.layers, by, first=first, last=last, columns=columns)
        return json_response({"attempt": attempt.number, "kept": "incident", **found})

    async def _incident(self, request: web.Request) -> web.Response:
        run = self._find(request)
        for incident in run.incidents.kept:
            if str(incident.number) == request.match_info["id"]:
                window = self._store.incident_window(run.name, incident.number)
                return json_response(
                    {**incident_answer(incident), "records": [] if window is None else window.largest_records()}
                )
        raise json_error(web.HTTPNotFound, f"run {run.name!r} has no incident {request.match_info['id'][:80]!r}")

    def _find(self, request: web.Request) -> Run:
        name = request.match_info["run"]
        run = self._runs.get(name)
        if run is None:
            raise json_error(web.HTTPNotFound, f"there is no run {name[:200]!r}; /api/v1/runs lists them")
        return run

    def _summary_or_unknown(self, run: Run) -> RunSummary:
        try:
            return summary_of(run, self._clock(), self._silent)
        except Exception as failure:
            run.errors.add("page", failure)
            return _unknown(run)


def _last_report(run: RunSummary) -> float:
    return run.last_report


def _unknown(run: Run) -> RunSummary:
    """Return the summary of a run whose own cannot be made."""
    return RunSummary(
        run=run.name,
        experiment=run.experiment,
        active=True,
        condition="unknown",
        attempt=0,
        started_seconds=0.0,
        world_size=0,
        ranks_reporting=0,
        failing=False,
        building_up=False,
        verdict="unknown",
        newest={},
        steps=0,
        last_report=0.0,
        last_step=0.0,
        stall_threshold=0.0,
        errors=run.errors.nonzero(),
    )


def _attempt_of(request: web.Request, run: Run) -> Attempt:
    chosen = query_number(request, "attempt", run.newest.number)
    if chosen >= len(run.attempts):
        raise json_error(web.HTTPNotFound, f"run {run.name!r} has no attempt {chosen}")
    return run.attempts[chosen]


def _local_norms(attempt: Attempt, sequences: list[int]) -> dict[str, list[Any]] | None:
    """Return a column for each rank; None if the attempt is evicted or has too many ranks."""
    if attempt.evicted or attempt.world_size > _MOST_RANK_COLUMNS:
        return None
    norms = attempt.buffer.local_norms_by_rank(np.array(sequences, np.int64))
    unknown = [math.nan] * len(sequences)
    return {str(rank): norms[rank].tolist() if rank in norms else unknown for rank in sorted(attempt.instances)}


def query_number(request: web.Request, name: str, default: int) -> int:
    """Return a whole number from the query; a wrong one is named in the error."""
    text = request.query.get(name, str(default))
    # Python refuses to read a number of thousands of digits, and SQLite takes none beyond 64 bits.
    if not text.isdecimal() or len(text) > 16:
        raise json_error(web.HTTPBadRequest, f"{name} must be a whole number, not {text[:80]!r}")
    return int(text)


def json_error(kind: type[web.HTTPException], text: str) -> web.HTTPException:
    """Return an error with a JSON body."""
    return kind(text=json.dumps({"error": text}), content_type="application/json")


def json_response(value: Any) -> web.Response:
    """Return JSON, compressed if it is large and the client supports it."""
    response = web.json_response(text=json.dumps(_without_nan(value), allow_nan=False))
    response.enable_compression()
    return response


def _without_nan(value: Any) -> Any:
    """Replace every NaN and infinity, which JSON does not have, by "nan", "inf" or "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value
