"""Every environment variable of Foreshock: what it sets, and what is said about a name that is none of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple

PREFIX = "FORESHOCK_"
COLLECTOR_PREFIX = "FORESHOCK_COLLECTOR_"
"""Settings of the collector, each named as its flag is; the collector knows them, a rank does not."""


class Variable(NamedTuple):
    """One variable."""

    name: str
    default: str
    """As it would be written; empty: not set."""
    meaning: str


VARIABLES = (
    Variable("FORESHOCK_CLIP", "none", "Clips: a largest norm, `adaptive`, `adaptive 1.0`, or `none`."),
    Variable("FORESHOCK_SKIP", "0", "1 leaves out steps that would ruin the weights, within a budget."),
    Variable("FORESHOCK_SHADOW", "0", "1 clips and leaves out nothing, and counts what would have been."),
    Variable("FORESHOCK_LOCAL_NORMS", "1", "0 leaves DDP's communication hook alone: no norms of single ranks."),
    Variable("FORESHOCK_COLLECTOR", "127.0.0.1:4327", "host:port of the collector's gRPC service."),
    Variable("FORESHOCK_EXPERIMENT", "default", "What the run belongs to; groups runs on dashboards."),
    Variable("FORESHOCK_RUN", "", "Name of the run; else the scheduler's or torchrun's, else a new one."),
    Variable("FORESHOCK_DISABLED", "0", "1 on any rank turns Foreshock off on all."),
    Variable("FORESHOCK_ATTACH_TIMEOUT", "60", "Seconds that a rank waits in `attach` for the others."),
    Variable("FORESHOCK_RECORDER_PYTHON", "", "Python interpreter of the recorder; else the rank's own."),
    Variable("FORESHOCK_RING_DIR", "", "Folder of the ranks' rings; else shared memory, else the temporary folder."),
    Variable("FORESHOCK_HTTP_PROXY", "0", "1 lets recorder and commands use the proxy that the environment names."),
    Variable("FORESHOCK_STRICT", "0", "1 raises internal errors of the probe instead of counting them: for tests."),
    Variable("FORESHOCK_URL", "http://127.0.0.1:9327", "Where `foreshock status` and the like find the collector."),
)
_NAMES = tuple(variable.name for variable in VARIABLES)


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """A line for each name in the environment that begins as ours do and is none of them, with the nearest that is."""
    strangers = sorted(
        name
        for name in environment
        if name.startswith(PREFIX) and name not in _NAMES and not name.startswith(COLLECTOR_PREFIX)
    )
    return [f"{name} is not a variable of Foreshock, and is ignored{_nearest(name)}" for name in strangers]


def _nearest(name: str) -> str:
    # Without what they have in common, or every name would be near.
    known = [known[len(PREFIX) :] for known in _NAMES]
    near = difflib.get_close_matches(name[len(PREFIX) :], known, n=1, cutoff=0.5)
    return f"; did you mean {PREFIX}{near[0]}?" if near else ""
