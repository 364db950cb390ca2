"""Ranks agree before any hook is registered.

A hook issues a collective every step, so one rank that goes without it would hang the job: `if rank == 0: attach(...)`,
a kill switch on one node, another clip on one rank. Every rank posts what it has to the process group's store, rank 0
decides, and all hear the same decision.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch._C._distributed_c10d import Store

from foreshock._errors import AttachError

_POLL_SECONDS = 0.02
_GRACE_SECONDS = 5.0
"""How much longer than rank 0 the others wait, so that they hear which rank it missed."""


@dataclass(frozen=True, kw_only=True)
class Posting:
    """What one rank brings."""

    version: str
    clip: str
    local_norms: bool
    disabled: bool
    error: str = ""
    """Why this rank cannot attach; its own process raises."""
    hook_taken: bool = False
    """The model has a communication hook of the script's own."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What all ranks do."""

    run: str
    launch: str
    local_norms: bool = True
    disabled: str = ""
    """Why nobody watches; empty: all do."""
    error: str = ""
    """Why attach raises everywhere."""
    hook_taken: bool = False


def decide(postings: list[Posting | None], *, run: str, launch: str, timeout: float) -> Decision:
    """One decision from what the ranks posted; None stands for a rank that did not."""
    present = {rank: posting for rank, posting in enumerate(postings) if posting is not None}
    missing = [rank for rank, posting in enumerate(postings) if posting is None]
    if missing:
        error = f"{_ranks(missing)} did not call foreshock.attach within {timeout:g} s; call it on every rank"
        return Decision(run=run, launch=launch, error=error)
    if disabled := [rank for rank, posting in present.items() if posting.disabled]:
        return Decision(run=run, launch=launch, disabled=f"FORESHOCK_DISABLED is set on {_ranks(disabled)}")
    if failed := [rank for rank, posting in present.items() if posting.error]:
        why = f"attach failed on {_ranks(failed)}: {present[failed[0]].error}"
        return Decision(run=run, launch=launch, disabled=why)
    for setting in ("version", "clip", "local_norms"):
        values = {rank: getattr(posting, setting) for rank, posting in present.items()}
        other = [rank for rank, value in values.items() if value != values[0]]
        if other:
            error = f"{setting} differs: {values[0]} on rank 0, {values[other[0]]} on {_ranks(other)}"
            return Decision(run=run, launch=launch, error=error)
    taken = any(posting.hook_taken for posting in present.values())
    return Decision(run=run, launch=launch, local_norms=postings_local(present) and not taken, hook_taken=taken)


def postings_local(present: dict[int, Posting]) -> bool:
    """Local norms are measured where every rank wants them."""
    return all(posting.local_norms for posting in present.values())


def post(store: Store, rank: int, posting: Posting) -> None:
    """Tell the others."""
    store.set(f"rank/{rank}", json.dumps(asdict(posting)))


def agree(
    store: Store, *, rank: int, world_size: int, posting: Posting, run: str, launch: str, timeout: float
) -> Decision:
    """Post, and hear the decision. Blocks until every rank has posted, at most `timeout` seconds (5 more off rank 0).

    Raises `AttachError` where ranks are missing or contradict each other.
    """
    post(store, rank, posting)
    if rank == 0:
        _wait(store, [f"rank/{other}" for other in range(world_size)], timeout)
        decision = decide(_postings(store, world_size), run=run, launch=launch, timeout=timeout)
        store.set("decision", json.dumps(asdict(decision)))
    elif _wait(store, ["decision"], timeout + _GRACE_SECONDS):
        decision = Decision(**json.loads(store.get("decision")))
    else:
        decision = decide(_postings(store, world_size), run=run, launch=launch, timeout=timeout)
    if decision.error:
        raise AttachError(decision.error)
    return decision


def _postings(store: Store, world_size: int) -> list[Posting | None]:
    return [
        Posting(**json.loads(store.get(key))) if store.check([key]) else None
        for key in (f"rank/{rank}" for rank in range(world_size))
    ]


def _wait(store: Store, keys: list[str], timeout: float) -> bool:
    """Poll: `store.wait` breaks its connection when it times out, and the missing ranks are yet to be named."""
    store.set_timeout(timedelta(seconds=timeout + 60))
    deadline = time.monotonic() + timeout
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
