"""The API as JSON: runs, their steps and records, incidents. What the page shows comes from here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from aiohttp import web

from foreshock_collector.analysis.verdict_table import VERDICT_TABLE, Cause
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
"""Most ranks whose local norms by step are included in an answer."""
_MOST_POINTS = 2000
_NO_END = 2**53


class Api:
    """Serves the JSON API."""

    def __init__(self, *, runs: Runs, store: Store, clock: Callable[[], float], silent: float) -> None:
        self._runs = runs
        self._store = store
        self._clock = clock
        self._silent = silent
        self._baselines = Baselines(store)
        self._downsampler = Downsampler(store)
        self._sparklines = Sparklines(store)

    def routes(self) -> list[web.RouteDef]:
        """All under /api/v1."""
        return [
            web.get("/api/v1/runs", self._list),
            web.get(f"/api/v1/runs/{RUN}", self._run),
            web.get(f"/api/v1/runs/{RUN}/steps", self._steps),
            web.get(f"/api/v1/runs/{RUN}/series", self._series),
            web.get(f"/api/v1/runs/{RUN}/heat/{{by:ranks|layers}}", self._heat),
            web.get(f"/api/v1/runs/{RUN}/incidents/{{id}}", self._incident),
        ]

    async def _list(self, request: web.Request) -> web.Response:
        now = self._clock()
        runs = sorted(self._runs, key=lambda run: run.errors.value("page", 0.0, run.last_report), reverse=True)
        ended = [run for run in runs if not run.errors.value("page", True, run.active, now, self._silent)]
        left_out = set(ended[number(request, "ended", len(ended)) :])
        runs = [run for run in runs if run not in left_out]
        briefs = [self._brief_at_least(run) for run in runs]
        if number(request, "recent", 0):
            for brief, run, columns in zip(briefs, runs, self._sparklines.points(runs), strict=True):
                brief["recent"] = columns
                open_ = [each for each in run.incidents.kept if each.closed_seconds is None]
                brief["open_incidents"] = [incident_answer(each) for each in open_]
        return answer({"now_seconds": now, "ended": len(ended), "runs": briefs})

    async def _run(self, request: web.Request) -> web.Response:
        run = self._find(request)
        attempt = run.newest
        model, optimizer = attempt.model, attempt.hello.optimizer
        ranks = sorted(attempt.instances.values(), key=lambda instance: (instance.reporting, instance.rank))
        ranks = ranks[: number(request, "ranks", len(ranks))]
        return answer(
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
        after = number(request, "after", 0)
        limit = min(number(request, "limit", 1000), _MOST_STEPS)
        columns = self._store.steps(run.name, attempt=attempt.number, after=after, limit=limit)
        norms = _local_norms(attempt, columns["sequence"])
        return answer({"attempt": attempt.number, **columns, "local_norm": norms})

    async def _series(self, request: web.Request) -> web.Response:
        """Steps for the eye: at most `points`, and the baseline band. Of a bin, the step with the largest norm."""
        run = self._find(request)
        attempt = _attempt_of(request, run)
        points = max(1, min(number(request, "points", 1000), _MOST_POINTS))
        first, last = max(1, number(request, "first", 1)), min(attempt.finalized, number(request, "last", _NO_END))
        bin_width, columns = await self._downsampler.bins(
            run.name, attempt.number, first=first, last=last, points=points
        )
        baseline = await self._baselines.replayed(
            run.name, attempt.number, max(columns["sequence"], default=0), run.rules
        )
        view = {"attempt": attempt.number, "newest": attempt.finalized, "bin_width": bin_width}
        return answer({**view, **columns, **baseline.at(columns["sequence"])})

    async def _heat(self, request: web.Request) -> web.Response:
        """Norms by rank or layer: the largest of each bin_width of steps. At rest, those around an incident."""
        run = self._find(request)
        attempt = _attempt_of(request, run)
        by = request.match_info["by"]
        columns = max(1, min(number(request, "columns", 240), _MOST_POINTS))
        first, last = number(request, "first", 1), number(request, "last", _NO_END)
        if not attempt.evicted:
            found = heat.at_hand(attempt, by, first=first, last=last, columns=columns)
            return answer({"attempt": attempt.number, "kept": "newest", **found})
        of_it = [each.number for each in run.incidents.kept if each.attempt == attempt.number]
        windows = (self._store.incident_window(run.name, number_) for number_ in reversed(of_it))
        window = next((window for window in windows if window is not None), None)
        found = heat.around_incident(window, attempt.model.layers, by, first=first, last=last, columns=columns)
        return answer({"attempt": attempt.number, "kept": "incident", **found})

    async def _incident(self, request: web.Request) -> web.Response:
        run = self._find(request)
        for incident in run.incidents.kept:
            if str(incident.number) == request.match_info["id"]:
                window = self._store.incident_window(run.name, incident.number)
                return answer({**incident_answer(incident), "records": [] if window is None else window.loudest()})
        raise error(web.HTTPNotFound, f"run {run.name!r} has no incident {request.match_info['id'][:80]!r}")

    def _find(self, request: web.Request) -> Run:
        name = request.match_info["run"]
        run = self._runs.get(name)
        if run is None:
            raise error(web.HTTPNotFound, f"there is no run {name[:200]!r}; /api/v1/runs lists them")
        return run

    def _brief_at_least(self, run: Run) -> dict[str, Any]:
        try:
            return self._brief(run)
        except Exception as failure:
            run.errors.add("page", failure)
            return _nothing_of(run)

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


def _nothing_of(run: Run) -> dict[str, Any]:
    """A brief that says no more than that there is none."""
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
    chosen = number(request, "attempt", run.newest.number)
    if chosen >= len(run.attempts):
        raise error(web.HTTPNotFound, f"run {run.name!r} has no attempt {chosen}")
    return run.attempts[chosen]


def _local_norms(attempt: Attempt, sequences: list[int]) -> dict[str, list[Any]] | None:
    """By rank, a column each, as far as they are at hand; None of an attempt that rests, or has too many ranks."""
    if attempt.evicted or attempt.world_size > _MOST_RANK_COLUMNS:
        return None
    table = attempt.buffer.local_norms(np.array(sequences, np.int64))
    return {str(rank): table[:, rank].tolist() for rank in sorted(attempt.instances)}


def number(request: web.Request, name: str, default: int) -> int:
    """A whole number from the query; a wrong one is answered by name."""
    text = request.query.get(name, str(default))
    if not text.isdecimal() or len(text) > 16:
        raise error(web.HTTPBadRequest, f"{name} must be a whole number, not {text[:80]!r}")
    return int(text)


def error(kind: type[web.HTTPException], text: str) -> web.HTTPException:
    """An error for machines."""
    return kind(text=json.dumps({"error": text}), content_type="application/json")


def answer(value: Any) -> web.Response:
    """JSON, compressed if it is large and the other side can."""
    response = web.json_response(text=json.dumps(_strict(value), allow_nan=False))
    response.enable_compression()
    return response


def _strict(value: Any) -> Any:
    """JSON has no NaN: null in its place, and "nan", "inf" or "-inf" where nothing beside it says which."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value
