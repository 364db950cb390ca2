"""Who this rank is: names that the launcher, the scheduler or the user gave."""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import time
import uuid
from collections.abc import Collection, Mapping

from foreshock_recorder.process import start_ticks


def run_name(explicit: str, environment: Mapping[str, str]) -> str:
    """The run: what the user says, else the scheduler's job, else torchrun's, else a new name.

    A restart by torchrun keeps the name: without a job id it is made from the launcher's own process, which outlives
    the ranks. Called on rank 0, which passes it to the others.
    """
    if explicit:
        return explicit
    if job := environment.get("SLURM_JOB_ID"):
        return f"slurm-{job}"
    elastic = environment.get("TORCHELASTIC_RUN_ID", "")
    if elastic and elastic != "none":
        return elastic
    if elastic:
        launcher = os.getppid()
        started = start_ticks(launcher)
        return f"run-{uuid.uuid5(uuid.NAMESPACE_OID, f'{socket.gethostname()} {launcher} {started}').hex[:10]}"
    return f"run-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def free_name(name: str, in_use: Collection[str]) -> str:
    """Return the name, or the first of name-2, name-3 and so on that is not in use by another model of this process.

    The collector would do so too, in the order in which recorders happen to reach it. A script that is started again
    must not swap the runs of its models.
    """
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in in_use)


def launch_name() -> str:
    """One attach of all ranks together: sorts by time, unique. The collector numbers a run's launches as attempts."""
    return f"{time.time_ns():020d}-{secrets.token_hex(4)}"


def node_name() -> str:
    """This machine, as people know it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def local_rank(rank: int) -> int:
    """Number of this rank on its node."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", rank)))
