"""Ranks agree before any hook is registered.

A hook issues a collective every step, so one rank that goes without it would hang the job: `if rank == 0: attach(...)`,
a kill switch on one node, another clip on one rank. Every rank posts what it has to the process group's store, rank 0
decides, and all read the same agreement. A rank that is disabled or has failed does not wait: it only posts that.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TypeVar

from foreshock._errors import AttachError
from foreshock._torch import PrefixStore, Store

_POLL_SECONDS = 0.02
_GRACE_SECONDS = 5.0
"""Seconds that the others wait longer than rank 0, so that they can name the rank it missed."""


@dataclass(frozen=True, kw_only=True)
class RankProposal:
    """Proposes one rank's settings."""

    version: str
    clip: str = ""
    skip: bool = False
    dry_run: bool = False
    experiment: str = ""
    local_norms: bool = True
    disabled: bool = False
    """The kill switch is on."""
    error: str = ""
    """Why this rank cannot attach."""
    needs_comm_hook: bool = False
    """Whether the model's own gradients show only in a communication hook."""
    triton: bool = False
    """Whether Triton's kernels run on this rank."""
    kernel_error: str = ""
    """Why they do not, where they should."""
    comm_hook_taken: bool = False
    """Whether the script has registered a communication hook of its own."""
    resumes: bool = False
    """Whether this rank asks for the history of the attempt before."""
    history: dict[str, float | None] = field(default_factory=dict)
    """That history, as rank 0 knows it."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Says what all ranks do."""

    run: str
    launch: str
    local_norms: bool = True
    disabled: str = ""
    """Why nobody watches; empty: all do."""
    error: str = ""
    """Why attach raises everywhere."""
    by_bucket: bool = False
    """Whether local norms come from the communication hook, on every rank or on none: sums are issued there too."""
    triton: bool = False
    """Whether kernels decide, on every rank or on none: their norms may differ from those of tensor operations in the
    last bit, and so would weights."""
    kernel_error: str = ""
    """Which ranks cannot run kernels, and why; empty where that is no fault."""
    local_norms_missing: bool = False
    """Whether a script's own communication hook prevents local norms."""
    resumes: bool = False
    """Whether all ranks ask for the history of the attempt before."""
    history: dict[str, float | None] = field(default_factory=dict)
    """History that all ranks begin with; empty: none."""


def decide(proposals: list[RankProposal | None], *, run: str, launch: str, timeout: float) -> Agreement:
    """One decision from what the ranks posted; None stands for a rank that did not.

    What a rank has said goes before what is missing: one disabled or failed rank disables all.
    """
    present = {rank: proposal for rank, proposal in enumerate(proposals) if proposal is not None}
    if disabled := [rank for rank, proposal in present.items() if proposal.disabled]:
        return Agreement(run=run, launch=launch, disabled=f"FORESHOCK_DISABLED is set on {_ranks(disabled)}")
    if failed := [rank for rank, proposal in present.items() if proposal.error]:
        why = f"attach failed on {_ranks(failed)}: {present[failed[0]].error}"
        return Agreement(run=run, launch=launch, disabled=why)
    if absent := [rank for rank, proposal in enumerate(proposals) if proposal is None]:
        error = f"{_ranks(absent)} did not call foreshock.attach within {timeout:g} s; call it on every rank"
        return Agreement(run=run, launch=launch, error=error)
    for setting in ("version", "clip", "skip", "dry_run", "experiment", "local_norms"):
        values = {rank: getattr(proposal, setting) for rank, proposal in present.items()}
        other = [rank for rank, value in values.items() if value != values[0]]
        if other:
            theirs = f"{values[other[0]]} on {_ranks(other)}"
            error = f"{setting} differs: {values[0]} on rank 0, {theirs}; it must be the same on every rank"
            return Agreement(run=run, launch=launch, error=error)
    by_bucket = any(proposal.needs_comm_hook for proposal in present.values())
    missing = by_bucket and any(proposal.comm_hook_taken for proposal in present.values())
    local_norms = present[0].local_norms and not missing
    without = [rank for rank, proposal in present.items() if proposal.kernel_error]
    return Agreement(
        run=run,
        launch=launch,
        local_norms=local_norms,
        by_bucket=by_bucket,
        triton=all(proposal.triton for proposal in present.values()),
        kernel_error=f"{_ranks(without)}: {present[without[0]].kernel_error}" if without else "",
        local_norms_missing=missing,
        resumes=all(proposal.resumes for proposal in present.values()),
        history=present[0].history,
    )


def agree(
    store: Store, *, rank: int, world_size: int, proposal: RankProposal, run: str, launch: str, timeout: float
) -> Agreement:
    """Return the agreement. Blocks until every rank has made a proposal, at most `timeout` seconds (5 more off rank 0).

    Ranks agree in the same order, as with any collective, each time in a new namespace: the store counts them, since a
    process may have attached before, in a group that is gone. Raises `AttachError` where ranks are missing or
    contradict each other, or the store is gone.
    """
    try:
        namespace = PrefixStore(str(store.add(f"agreements/{rank}", 1)), store)
        decision = _ask(namespace, rank, world_size, proposal, Agreement(run=run, launch=launch), timeout)
    except RuntimeError as error:
        # Of the store: the process that serves it has ended.
        raise AttachError(f"the store is unreachable: a rank exited while the others attached ({error})") from error
    if decision.error:
        raise AttachError(decision.error)
    return decision


def _ask(
    store: Store, rank: int, world_size: int, proposal: RankProposal, names: Agreement, timeout: float
) -> Agreement:
    store.set(_keys(world_size)[rank], json.dumps(asdict(proposal)))
    out = bool(proposal.disabled or proposal.error)
    if rank and not out and _wait(store, ["decision"], timeout + _GRACE_SECONDS):
        return _read(Agreement, store.get("decision"))
    if rank == 0 and not out:
        _wait(store, _keys(world_size), timeout)
    proposals = [_read(RankProposal, store.get(key)) if store.check([key]) else None for key in _keys(world_size)]
    decision = decide(proposals, run=names.run, launch=names.launch, timeout=timeout)
    if out and rank:
        return decision
    if rank and not (decision.error or decision.disabled):
        decision = replace(decision, error=f"rank 0 called foreshock.attach more than {timeout:g} s after others")
    # The first decision stands: one that gives up waiting and rank 0 that is just done must not part ways.
    return _read(Agreement, store.compare_set("decision", "", json.dumps(asdict(decision))))


def _keys(world_size: int) -> list[str]:
    return [f"rank/{rank}" for rank in range(world_size)]


_Kind = TypeVar("_Kind", RankProposal, Agreement)


def _read(kind: type[_Kind], text: bytes) -> _Kind:
    # Ranks of another version may post more, and must still learn that the version differs.
    known = {each.name for each in fields(kind)}
    return kind(**{name: value for name, value in json.loads(text).items() if name in known})


def _wait(store: Store, keys: list[str], timeout: float) -> bool:
    """Poll: `store.wait` breaks its connection when it times out, and the missing ranks are yet to be named.

    The store's own time-out is the job's, and stays as it is.
    """
    deadline = time.monotonic() + timeout
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
