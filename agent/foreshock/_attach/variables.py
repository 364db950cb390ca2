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
    Variable("FORESHOCK_CLIP", "none", "Clipping: a maximum norm, `adaptive`, `adaptive 1.0`, or `none`."),
    Variable("FORESHOCK_SKIP", "0", "1 skips steps that would corrupt the weights, within a budget."),
    Variable("FORESHOCK_DRY_RUN", "0", "1 is a dry run: clips and skips nothing, and counts what it would have done."),
    Variable("FORESHOCK_LOCAL_NORMS", "1", "0 does not measure each rank's own gradient, before the all-reduce."),
    Variable("FORESHOCK_COLLECTOR", "127.0.0.1:4327", "host:port of the collector's gRPC service."),
    Variable("FORESHOCK_EXPERIMENT", "default", "Experiment that the run belongs to; groups runs on dashboards."),
    Variable("FORESHOCK_RUN", "", "Name of the run; defaults to the scheduler's or torchrun's job name, or a new one."),
    Variable("FORESHOCK_DISABLED", "0", "1 on any rank disables Foreshock on all ranks."),
    Variable("FORESHOCK_ATTACH_TIMEOUT", "60", "Seconds that a rank waits for the others in `attach`."),
    Variable(
        "FORESHOCK_MIRROR",
        "",
        "Mirrors the run in `tensorboard`, `wandb`, `mlflow`, `trackio`; several with commas between.",
    ),
    Variable("FORESHOCK_RECORDER_PYTHON", "", "Python interpreter that runs the recorder; defaults to the rank's."),
    Variable("FORESHOCK_RING_DIR", "", "Folder for rings; defaults to shared memory or the temporary folder."),
    Variable("FORESHOCK_HTTP_PROXY", "0", "1 lets the recorder and the commands use the proxy from the environment."),
    Variable("FORESHOCK_TOKEN_FILE", "", "File of the token that the collector asks for."),
    Variable("FORESHOCK_CA_FILE", "", "File of the certificates that sign the collector's, in PEM; turns TLS on."),
    Variable("FORESHOCK_CERTIFICATE_FILE", "", "File of this machine's certificate, if the collector asks for one."),
    Variable("FORESHOCK_KEY_FILE", "", "File of its private key."),
    Variable("FORESHOCK_STRICT", "0", "1 raises the probe's internal errors instead of counting them; for tests."),
    Variable("FORESHOCK_URL", "http://127.0.0.1:9327", "HTTP address of the collector, for commands."),
)
_NAMES = tuple(variable.name for variable in VARIABLES)


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """A line for each name in the environment that begins as ours do and is none of them, with the nearest that is."""
    strangers = sorted(
        name
        for name in environment
        if name.startswith(PREFIX) and name not in _NAMES and not name.startswith(COLLECTOR_PREFIX)
    )
    return [f"{name} is not a Foreshock variable and is ignored{_nearest(name)}" for name in strangers]


def _nearest(name: str) -> str:
    # Without what they have in common, or every name would be near.
    known = [known[len(PREFIX) :] for known in _NAMES]
    near = difflib.get_close_matches(name[len(PREFIX) :], known, n=1, cutoff=0.5)
    return f"; did you mean {PREFIX}{near[0]}?" if near else ""
