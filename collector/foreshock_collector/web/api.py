"""The API as JSON: runs, their steps and records, incidents. What the page shows comes from here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from aiohttp import web

from foreshock_collector.analysis.verdict_entry import Cause
from foreshock_collector.analysis.verdict_table import VERDICT_TABLE
from foreshock_collector.state.attempts import Attempt
from foreshock_collector.state.condition import condition
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.runs import Run
from foreshock_collector.state.store import Store
from foreshock_collector.web import heat
from foreshock_collector.web.answers import attempt_answer, event_answer, incident_answer, rank_answer
from foreshock_collector.web.baseline import Baselines
from foreshock_collector.web.downsampling import Downsampler
from foreshock_collector.web.sparklines import Sparklines

RUN = "{run:[^/]+}"
"""In a route: any name, percent-encoded. A bare {run} leaves out names with braces."""
_MOST_STEPS = 10_000
_MOST_RANK_COLUMNS = 64
"""Most ranks for which the steps carry local norms."""
_MOST_POINTS = 2000
_NO_END = 2**53


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
        now = self._clock()
        runs = sorted(self._runs, key=lambda run: run.errors.value("page", 0.0, run.last_report), reverse=True)
        ended = [run for run in runs if not run.errors.value("page", True, run.active, now, self._silent)]
        omitted = set(ended[query_number(request, "ended", len(ended)) :])
        runs = [run for run in runs if run not in omitted]
        briefs = [self._brief_or_unknown(run) for run in runs]
        if query_number(request, "recent", 0):
            for brief, run, columns in zip(briefs, runs, self._sparklines.points(runs), strict=True):
                brief["recent"] = columns
                open_ = [each for each in run.incidents.kept if each.closed_seconds is None]
                brief["open_incidents"] = [incident_answer(each) for each in open_]
        facts = {"now_seconds": now, "ended": len(ended), "archived": len(self._runs.archived)}
        return json_response({**facts, "runs": briefs})

    async def _run(self, request: web.Request) -> web.Response:
        run = self._find(request)
        attempt = run.newest
        model, optimizer = attempt.model, attempt.hello.optimizer
        ranks = sorted(attempt.instances.values(), key=lambda instance: (instance.reporting, instance.rank))
        ranks = ranks[: query_number(request, "ranks", len(ranks))]
        return json_response(
            {
                **self._brief(run),
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

    def _brief_or_unknown(self, run: Run) -> dict[str, Any]:
        try:
            return self._brief(run)
        except Exception as failure:
            run.errors.add("page", failure)
            return _unknown_brief(run)

    def _brief(self, run: Run) -> dict[str, Any]:
        attempt = run.newest
        newest = run.incidents.newest
        cause: Cause = newest.verdict.cause if newest else "healthy"
        now = self._clock()
        return {
            "run": run.name,
            "experiment": run.experiment,
            "state": "active" if run.active(now, self._silent) else "ended",
            "condition": condition(run, now, self._silent),
            "attempt": attempt.number,
            "started_seconds": attempt.started_seconds,
            "world_size": attempt.world_size,
            "ranks_reporting": sum(instance.reporting for instance in attempt.instances.values()),
            "verdict": cause,
            "verdict_title": VERDICT_TABLE[cause].title,
            "failing": attempt.detector.failing,
            "building_up": attempt.detector.gradient.in_build_up,
            "newest": run.totals.newest() if attempt.finalized else {},
            "last_report_seconds": run.last_report(),
            "last_step_seconds": run.totals.last["step"],
            "stall_threshold_seconds": run.stall_threshold(),
            "errors": run.errors.nonzero(),
        }


def _unknown_brief(run: Run) -> dict[str, Any]:
    """Return a brief for a run whose own cannot be made."""
    return {
        "run": run.name,
        "experiment": run.experiment,
        "state": "active",
        "condition": "unknown",
        "attempt": 0,
        "started_seconds": 0.0,
        "world_size": 0,
        "ranks_reporting": 0,
        "verdict": "unknown",
        "verdict_title": VERDICT_TABLE["unknown"].title,
        "failing": False,
        "building_up": False,
        "newest": {},
        "last_report_seconds": 0.0,
        "last_step_seconds": 0.0,
        "stall_threshold_seconds": 0.0,
        "errors": run.errors.nonzero(),
    }


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
