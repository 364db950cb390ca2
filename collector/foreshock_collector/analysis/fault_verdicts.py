"""Verdicts on failures without a NaN: persistent faults of a training, and a run that makes no steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from foreshock_collector.analysis.faults import FaultTransition
from foreshock_collector.analysis.verdicts import Verdict, make_verdict
from foreshock_collector.records.steps import ModelFacts

_MOST_RANKS = 8
"""How many ranks a sentence names at most."""


def verdict_on_fault(transition: FaultTransition, attempt: int, model: ModelFacts) -> Verdict:
    """Return the verdict on a fault that has begun."""
    layer = model.layers[transition.layer] if 0 <= transition.layer < len(model.layers) else ""
    rank = transition.rank if transition.rank >= 0 else None
    verdict = make_verdict(
        transition.cause,
        variant="from the start" if transition.exploded else "",
        attempt=attempt,
        step=transition.step,
        evidence=transition.evidence,
        rank=rank,
        layer=layer,
        in_layer=f" in layer {layer}" if layer else "",
        divergent="" if rank is None else f", and rank {rank} is unlike the others",
    )
    return replace(verdict, likely_root="learning_rate") if transition.exploded else verdict


def verdict_on_stall(
    attempt: int,
    step: int | None,
    seconds: float,
    limit: float,
    *,
    passes: Mapping[int, int],
    unfinished: Sequence[int],
    away: Sequence[int],
) -> Verdict:
    """Return the verdict on a run whose ranks are alive but make no step.

    step: the newest that any rank reported; None if there was none. seconds: time since then. limit: time after which a
    run counts as stalled. passes: backward passes of each live rank, which it counts before it waits for the others;
    all 0 if the probe does not count them. unfinished: ranks that lack the newest step or have not finished it. away:
    ranks that are not alive, so that nobody knows how far they came.
    """
    evidence = [
        f"no step for {seconds:.0f} s; the limit for this run is {limit:.0f} s",
        "its other ranks still report" if away else "its ranks still report",
    ]
    most = max(passes.values(), default=0)
    suspects = sorted(rank for rank, count in passes.items() if count < most)
    summary = ""
    if away:
        evidence.append(f"left or silent: {_ranks(away)}")
    if suspects:
        summary = f": {_ranks(suspects)} {_has(suspects)} not arrived, and the others wait"
        fewest = min(passes[rank] for rank in suspects)
        evidence.append(f"{_ranks(suspects)} counted {fewest} backward passes, the others {most}")
    elif away:
        suspects = sorted(away)
        summary = f": {_ranks(suspects)} {'is' if len(suspects) == 1 else 'are'} missing"
    elif unfinished:
        suspects = sorted(unfinished)
        summary = f": {_ranks(suspects)} {_has(suspects)} not finished step {step}"
        evidence.append(f"have not finished step {step}: {_ranks(suspects)}")
    elif most:
        summary = ": all ranks have come equally far"
        evidence.append(
            f"all ranks counted the same {most} backward passes: they wait in a collective, or one is held up before "
            "it counts the next"
        )
    return make_verdict(
        "stalled",
        attempt=attempt,
        step=step or 0,
        evidence=evidence,
        rank=suspects[0] if len(suspects) == 1 else None,
        since="has been made" if step is None else f"since step {step}",
        seconds=seconds,
        alive="other ranks are" if away else "the ranks are",
        suspects=summary,
    )


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:_MOST_RANKS]))
    more = f" and {len(ranks) - _MOST_RANKS} more" if len(ranks) > _MOST_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"


def _has(ranks: Sequence[int]) -> str:
    return "has" if len(ranks) == 1 else "have"
