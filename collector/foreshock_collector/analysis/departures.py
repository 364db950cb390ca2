"""Ranks that left unexpectedly: which one was first, what ended it, and the verdict on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from foreshock_collector.analysis.verdicts import Verdict, make_verdict

_LOST_PEER = re.compile(r"gloo|nccl|DistBackendError|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
"""Exceptions of a process group when another rank has gone."""
_ON_PURPOSE = re.compile(r"KeyboardInterrupt|SIGINT|SIGTERM|signal: (2|15|Interrupt|Terminated)\b")
"""Errors that follow from Ctrl-C or a scheduler, in addition to exits that are reported as interruptions."""
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|MemoryError|memory pressure", re.IGNORECASE)
_TOGETHER_SECONDS = 2.0
"""Recorders poll about once a second, so exits that they report within this time may have happened in any order."""
_SAME_MOMENT_SECONDS = 1.0
_MOST_TEXT, _SIMILAR_TEXT = 240, 40
_ALL_LOST_CONFIDENCE, _WITNESSED_SILENCE_CONFIDENCE = 0.6, 0.7
"""If all ranks are lost at the same moment, which one was first is a guess. A silence is surer if the error of another
rank confirms it."""


class Departure(NamedTuple):
    """A rank that left before the training was over."""

    seconds: float
    """Unix time, as exactly as it is known."""
    rank: int
    step: int | None
    """Its last step; None if it made none."""
    reason: str
    """EXCEPTION, LOST or INTERRUPTED."""
    detail: str
    """The exception, signal or exit code; empty if unknown."""

    @property
    def lost_peer(self) -> bool:
        """Whether it failed because another rank had gone."""
        return self.reason == "EXCEPTION" and _LOST_PEER.search(self.detail) is not None

    @property
    def on_purpose(self) -> bool:
        """Whether its user or its scheduler ended it."""
        return self.reason == "INTERRUPTED" or _ON_PURPOSE.search(self.detail) is not None

    @property
    def successful(self) -> bool:
        """Whether its process reported success: a script that ends with os._exit(0) reports nothing else."""
        return self.reason == "LOST" and self.detail == "exit code 0"

    @property
    def description(self) -> str:
        """What ended it, on one line."""
        text = " ".join(self.detail.split()) or "its process ended without reporting why"
        return text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 3]}..."


class Ending(NamedTuple):
    """The end of an attempt: its outcome and its cause."""

    first: Departure
    """The first departure that was not the consequence of another."""
    others: tuple[Departure, ...]

    @property
    def description(self) -> str:
        """Evidence for an incident that this ending belongs to."""
        return f"ended by rank {self.first.rank}: {self.first.description}"


def ending_of(departures: Sequence[Departure]) -> Ending | None:
    """Return what ended the attempt; None if it ended successfully or on purpose."""
    departures = [departure for departure in departures if not departure.successful]
    purpose = [departure.seconds for departure in departures if departure.on_purpose]
    causes = [departure for departure in departures if not departure.lost_peer and not departure.on_purpose]
    if not causes:
        if purpose or not departures:
            return None
        causes = departures  # every rank only reports that a peer has gone
    first = min(departure.seconds for departure in causes)
    if purpose and first > min(purpose) + _TOGETHER_SECONDS:
        return None
    near = [departure for departure in causes if departure.seconds <= first + _TOGETHER_SECONDS]
    # Of those that may have been first, one that reports why explains the most.
    cause = min(near, key=lambda d: (not d.detail, d.seconds, -1 if d.step is None else d.step, d.rank))
    return Ending(cause, tuple(departure for departure in departures if departure is not cause))


def verdict_on_ending(
    attempt: int, ending: Ending, world_size: int, silent: Sequence[tuple[int, int | None]]
) -> Verdict:
    """Return the verdict on an attempt that died. silent: ranks that stopped reporting, each with its last step."""
    first, others = ending
    if first.lost_peer and silent:
        witness = f"rank {first.rank} lost it: {first.description}"
        return verdict_on_silence(attempt, silent, world_size, witness=witness)
    similar = [
        d for d in others if d.lost_peer == first.lost_peer and d.detail and _kind(d.detail) == _kind(first.detail)
    ]
    peers = [d for d in others if d.lost_peer and d not in similar]
    lost = [d for d in others if not d.detail and d.reason == "LOST"]
    when = _when(first.step)
    evidence = [f"rank {first.rank} {when}: {first.detail or 'no reason reported: killed, or crashed in native code'}"]
    if similar:
        count = f"{1 + len(similar)} of {world_size} ranks"
        evidence.append(f"{count} ended this way, the last {_later(similar, first)} after the first")
    if peers:
        evidence.append(f"{_number(peers)} lost a peer: {peers[0].description}")
    if lost:
        evidence.append(f"{_number(lost)} ended without reporting why, the last {_later(lost, first)} after the first")
    if not first.detail:
        last = max((d.seconds for d in lost), default=first.seconds)
        all_at_once = len(lost) + 1 == world_size > 1 and last - first.seconds < _SAME_MOMENT_SECONDS
        return make_verdict(
            "rank_lost",
            attempt=attempt,
            step=first.step or 0,
            evidence=evidence,
            rank=first.rank,
            confidence=_ALL_LOST_CONFIDENCE if all_at_once else None,
            when=when,
        )
    several = bool(similar) and not first.lost_peer
    return make_verdict(
        "crashed",
        variant=_variant(first),
        attempt=attempt,
        step=first.step or 0,
        evidence=evidence,
        rank=first.rank,
        who=f"{1 + len(similar)} ranks" if several else f"Rank {first.rank}",
        when=when,
        first=f", rank {first.rank} first" if several else "",
        reason=first.description.removesuffix("."),
    )


def verdict_on_silence(
    attempt: int, silent: Sequence[tuple[int, int | None]], world_size: int, *, seconds: float = 0.0, witness: str = ""
) -> Verdict:
    """Return the verdict on ranks that stopped reporting without leaving.

    silent: at least one rank, each with its last step. seconds: how long the whole run has been silent; 0 if it is not.
    witness: what another rank reported about it.
    """
    rank, step = min(silent, key=lambda each: (-1 if each[1] is None else each[1], each[0]))
    alone = len(silent) == 1
    who = f"Rank {rank}" if alone else f"{len(silent)} of {world_size} ranks"
    duration = f" for {seconds:.0f} s" if seconds else ""
    evidence = [f"{who} fell silent {_when(step)} without reporting an exit{duration}"]
    return make_verdict(
        "rank_lost",
        variant="silent",
        attempt=attempt,
        step=step or 0,
        evidence=[*evidence, witness] if witness else evidence,
        rank=rank if alone else None,
        confidence=_WITNESSED_SILENCE_CONFIDENCE if witness else None,
        who=who,
        when=_when(step),
        them="it" if alone else "them",
        duration=duration,
    )


def _variant(first: Departure) -> str:
    out_of_memory = _OUT_OF_MEMORY.search(first.detail) is not None
    if first.lost_peer:
        # NCCL's own errors look like a lost peer, also those of a full device.
        return "lost peer, out of memory" if out_of_memory else "lost peer"
    if out_of_memory:
        return "out of memory"
    return "exception" if first.reason == "EXCEPTION" else ""


def _kind(detail: str) -> str:
    """Return what errors of one cause have in common: their numbers, such as a rank or an amount of memory, differ."""
    return re.sub(r"\d+", "", detail)[:_SIMILAR_TEXT]


def _when(step: int | None) -> str:
    return "before its first step" if step is None else f"after step {step}"


def _number(departures: Sequence[Departure]) -> str:
    return f"rank {departures[0].rank}" if len(departures) == 1 else f"{len(departures)} ranks"


def _later(departures: Sequence[Departure], first: Departure) -> str:
    return f"{max(0.0, max(d.seconds for d in departures) - first.seconds):.1f} s"
