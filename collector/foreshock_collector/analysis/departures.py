"""Ranks that left as they should not: which was the first, of what it died, and the verdict on it. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from foreshock_collector.analysis.verdicts import Verdict, finite_verdict

_LOST_PEER = re.compile(r"gloo|nccl|DistBackendError|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
"""What the exceptions of a process group say when another rank has gone."""
_ON_PURPOSE = re.compile(r"KeyboardInterrupt|SIGINT|SIGTERM|signal: (2|15|Interrupt|Terminated)\b")
"""What errors say that come of Ctrl-C or of a scheduler, beside goodbyes that say so themselves."""
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|MemoryError|memory pressure", re.IGNORECASE)
_TOGETHER_SECONDS = 2.0
"""Recorders look about once a second: what they tell within so long may have happened in any order."""
_MOST_TEXT, _ALIKE_TEXT = 240, 40


class Departure(NamedTuple):
    """A rank has left, and not because it was done."""

    seconds: float
    """Unix time, as near as it is known."""
    rank: int
    step: int | None
    """The last it told of; None: it made none."""
    reason: str
    """Of its goodbye: EXCEPTION, LOST or INTERRUPTED."""
    detail: str
    """The exception or the signal, as far as it is known."""

    @property
    def lost_peer(self) -> bool:
        """It died because another rank had gone."""
        return self.reason == "EXCEPTION" and _LOST_PEER.search(self.detail) is not None

    @property
    def on_purpose(self) -> bool:
        """Its user or its scheduler ended it."""
        return self.reason == "INTERRUPTED" or _ON_PURPOSE.search(self.detail) is not None

    @property
    def well(self) -> bool:
        """It said nothing, and its process reported success: a script that ends with os._exit(0)."""
        return self.reason == "LOST" and self.detail == "exit code 0"

    @property
    def told(self) -> str:
        """Its end in a few words."""
        text = " ".join(self.detail.split()) or "its process ended without a goodbye"
        return text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 3]}..."


class Ending(NamedTuple):
    """How an attempt came to its end."""

    first: Departure
    """Of these, the first that was not the consequence of another."""
    others: tuple[Departure, ...]

    @property
    def told(self) -> str:
        """For the incident that explains it."""
        return f"ended by rank {self.first.rank}: {self.first.told}"


def ending_of(left: Sequence[Departure]) -> Ending | None:
    """What began it; None where the job ended well or on purpose."""
    left = [departure for departure in left if not departure.well]
    purpose = [departure.seconds for departure in left if departure.on_purpose]
    causes = [departure for departure in left if not departure.lost_peer and not departure.on_purpose]
    if not causes:
        if purpose or not left:
            return None
        causes = left  # all say that a peer went away
    first = min(departure.seconds for departure in causes)
    if purpose and first > min(purpose) + _TOGETHER_SECONDS:
        return None
    near = [departure for departure in causes if departure.seconds <= first + _TOGETHER_SECONDS]
    # Of those that may have been first, one that says why explains the most.
    cause = min(near, key=lambda d: (not d.detail, d.seconds, -1 if d.step is None else d.step, d.rank))
    return Ending(cause, tuple(departure for departure in left if departure is not cause))


def verdict_on_ending(
    attempt: int, ending: Ending, world_size: int, silent: Sequence[tuple[int, int | None]]
) -> Verdict:
    """On an attempt that died. silent: ranks that have not left and are not heard of, each with its last step."""
    first, others = ending
    if first.lost_peer and silent:
        return verdict_on_silence(attempt, silent, world_size, told=f"rank {first.rank} lost it: {first.told}")
    alike = [
        d for d in others if d.lost_peer == first.lost_peer and d.detail and _kind(d.detail) == _kind(first.detail)
    ]
    peers = [d for d in others if d.lost_peer and d not in alike]
    lost = [d for d in others if not d.detail and d.reason == "LOST"]
    evidence = [
        f"rank {first.rank} {_when(first.step)}: {first.detail or 'no goodbye: killed, or crashed below Python'}"
    ]
    if alike:
        evidence.append(
            f"{1 + len(alike)} of {world_size} ranks ended so, the last {_later(alike, first)} after the first"
        )
    if peers:
        evidence.append(f"{_number(peers)} lost a peer: {peers[0].told}")
    if lost:
        evidence.append(f"{_number(lost)} ended without a goodbye, the last {_later(lost, first)} after the first")
    known = bool(first.detail)
    if not known:
        summary = f"Rank {first.rank} was lost {_when(first.step)}: its process ended without a goodbye."
    elif alike and not first.lost_peer:
        summary = f"{1 + len(alike)} ranks died {_when(first.step)}, rank {first.rank} first: {first.told}"
    else:
        summary = f"Rank {first.rank} died {_when(first.step)}: {first.told}"
    together = len(lost) + 1 == world_size > 1 and max(d.seconds for d in lost) - first.seconds < 1
    return finite_verdict(
        "crashed" if known else "rank_lost",
        attempt,
        rank=first.rank,
        step=first.step or 0,
        confidence=0.5 if first.lost_peer else 0.95 if known else 0.6 if together else 0.9,
        summary=summary if summary.endswith(".") else f"{summary}.",
        evidence=evidence,
        try_=_advice(first),
        alternatives=("another rank, its machine or the network failed first",) if first.lost_peer else (),
    )


def verdict_on_silence(
    attempt: int, silent: Sequence[tuple[int, int | None]], world_size: int, *, seconds: float = 0.0, told: str = ""
) -> Verdict:
    """On ranks that are no longer heard of, and never left.

    silent: each with its last step, at least one. seconds: for so long, where nothing is heard of the whole run.
    told: what another rank said of it.
    """
    rank, step = min(silent, key=lambda each: (-1 if each[1] is None else each[1], each[0]))
    alone = len(silent) == 1
    who = f"Rank {rank}" if alone else f"{len(silent)} of {world_size} ranks"
    since = f" for {seconds:.0f} s" if seconds else ""
    evidence = [f"{who} fell silent {_when(step)} without a goodbye{since}"]
    return finite_verdict(
        "rank_lost",
        attempt,
        rank=rank if alone else None,
        step=step or 0,
        confidence=0.7 if told else 0.6,
        summary=f"{who} fell silent {_when(step)}, without a goodbye: nothing has been heard of "
        f"{'it' if alone else 'them'}{since}.",
        evidence=[*evidence, told] if told else evidence,
        try_=(
            "look at the node: is it up, and does its training process still run?",
            "if the training goes on, look at its recorder and at the network between it and the collector",
            "else restart from the last checkpoint, without that node",
        ),
        alternatives=("the training goes on, and only the way to the collector is cut",),
    )


def _advice(first: Departure) -> tuple[str, ...]:
    again = "restart from the last checkpoint"
    if _OUT_OF_MEMORY.search(first.detail):
        return (
            "look for a batch that was longer than the rest, and for what grows with each step, such as kept losses",
            "a smaller batch, or activation checkpointing",
            again,
        )
    if first.reason == "EXCEPTION":
        return (
            f"read the traceback in the output of rank {first.rank}: it names the line",
            "if it is about data, run the batch of that step alone",
            again,
        )
    return (
        "look at the kernel's log of that node for the out-of-memory killer (dmesg), and at the scheduler's for a kill",
        "look at the rank's own output: a crash in native code leaves no Python traceback",
        again,
    )


def _kind(detail: str) -> str:
    """What is the same in errors of one cause: their numbers, such as a rank or an amount of memory, differ."""
    return re.sub(r"\d+", "", detail)[:_ALIKE_TEXT]


def _when(step: int | None) -> str:
    return "before its first step" if step is None else f"after step {step}"


def _number(those: Sequence[Departure]) -> str:
    return f"rank {those[0].rank}" if len(those) == 1 else f"{len(those)} ranks"


def _later(those: Sequence[Departure], first: Departure) -> str:
    return f"{max(0.0, max(d.seconds for d in those) - first.seconds):.1f} s"
