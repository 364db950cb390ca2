"""Verdicts on troubles without a NaN: what lasts (faults.py), and a run that stands still. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from foreshock_collector.analysis.faults import FaultTransition
from foreshock_collector.analysis.verdicts import Cause, Verdict, finite_verdict
from foreshock_collector.records.steps import ModelFacts

_SUMMARIES: dict[Cause, str] = {
    "duplicate_data": "From step {step} on, all ranks compute the same gradient: they see the same data.",
    "outlier_rank": "Since step {step} the gradient of rank {rank} is out of all proportion to the others'.",
    "replica_drift": "At step {step} the weights of the ranks differ: they train different models{who}.",
    "vanishing_gradients": "Since step {step} gradients have all but vanished{where}.",
    "loss_divergence": "The loss has climbed since step {step}, and no gradient build-up explains it.",
}
_CONFIDENCE: dict[Cause, float] = {
    "duplicate_data": 0.9,
    "outlier_rank": 0.8,
    "replica_drift": 0.95,
    "vanishing_gradients": 0.8,
    "loss_divergence": 0.7,
}
_ADVICE: dict[Cause, tuple[str, ...]] = {
    "duplicate_data": (
        "give the DataLoader a DistributedSampler, or split the data by rank yourself",
        "call sampler.set_epoch(epoch) at each epoch",
        "seed what draws the batches by rank, not alike everywhere",
    ),
    "outlier_rank": (
        "look at the data of that rank: another scale, another file, labels that do not belong to it",
        "look for what that rank does by itself: another loss weight, precision or batch size",
        "move it to another machine; if the fault stays behind, it is the device",
    ),
    "replica_drift": (
        "stop, and go back to a checkpoint from before that step: what is saved now is one rank's model",
        "look for what a rank does to weights by itself: a step under `if rank == 0`, a clip, a loaded checkpoint",
        "if nothing does, suspect the memory of that rank's device, and move it to another machine",
    ),
    "vanishing_gradients": (
        "ReLU, GELU or another activation that does not saturate, in place of sigmoid or tanh",
        "normalization (LayerNorm, BatchNorm) or residual connections, so that early layers get a gradient",
        "an initialization that fits the activation (Xavier, He)",
    ),
    "loss_divergence": (
        "a smaller learning rate, or one that decays: small steps in a bad direction add up",
        "look at what changed at that step: data, loss weights, regularization, a schedule",
        "go back to a checkpoint from before it",
    ),
    "stalled": (
        "dump the stacks of all ranks (py-spy dump --pid): the one that is not in a collective is the one to look at",
        "look for a rank that waits for data, for a lock, or in an evaluation that the others do not take part in",
        "set a time-out of the process group, so that a hang ends by itself",
    ),
}
_ALTERNATIVES: dict[Cause, tuple[str, ...]] = {
    "duplicate_data": ("batches so large that ranks differ by less than rounding",),
    "outlier_rank": ("data that are meant to be harder on that rank",),
    "vanishing_gradients": ("layers that are meant to learn nothing",),
    "loss_divergence": ("data that became harder for good",),
    "stalled": ("a long evaluation or checkpoint",),
}


def verdict_on_fault(change: FaultTransition, attempt: int, model: ModelFacts) -> Verdict:
    """On a trouble that has begun."""
    layer = model.layers[change.layer] if 0 <= change.layer < len(model.layers) else ""
    where = f" in layer {layer}" if layer else ""
    who = f": rank {change.rank} is unlike the others" if change.rank >= 0 else ""
    return finite_verdict(
        change.cause,
        attempt,
        step=change.step,
        rank=change.rank if change.rank >= 0 else None,
        layer=layer,
        confidence=_CONFIDENCE[change.cause],
        summary=_SUMMARIES[change.cause].format(step=change.step, where=where, who=who, rank=change.rank),
        evidence=change.evidence,
        try_=_ADVICE[change.cause],
        alternatives=_ALTERNATIVES.get(change.cause, ()),
    )


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
    """On a run of which ranks are there, and which makes no step.

    step: the newest that any rank told; None: there was none. seconds: since then; limit: what makes a stall.
    passes: backward passes of each rank that is there, counted before it waits for the others; all 0 where the probe
    does not count. unfinished: those that lack the newest step, or have not finished it. away: ranks that are not
    there, so that nobody knows how far they came.
    """
    still = "its other ranks still report" if away else "its ranks still report"
    evidence = [f"no step for {seconds:.0f} s; {limit:.0f} s would be long for this run", still]
    most = max(passes.values(), default=0)
    absent = sorted(rank for rank, count in passes.items() if count < most)
    who = ""
    if away:
        evidence.append(f"left, or not heard of: {_ranks(away)}")
    if absent:
        who = f": {_ranks(absent)} {'has' if len(absent) == 1 else 'have'} not arrived, and the others wait"
        fewest = min(passes[rank] for rank in absent)
        evidence.append(f"{_ranks(absent)} computed {fewest} backward passes, the others {most}")
    elif away:
        absent = sorted(away)
        who = f": {_ranks(absent)} {'is' if len(absent) == 1 else 'are'} not there"
    elif unfinished:
        absent = sorted(unfinished)
        who = f": {_ranks(absent)} {'has' if len(absent) == 1 else 'have'} not finished step {step}"
        evidence.append(f"not finished with step {step}: {_ranks(absent)}")
    elif most:
        who = ": all ranks have computed their gradients"
        evidence.append(
            f"all ranks computed the same {most} backward passes: they wait in the averaging, or one is held up in "
            "what follows it, before its next backward pass"
        )
    since = "has been made" if step is None else f"since step {step}"
    return finite_verdict(
        "stalled",
        attempt,
        step=step or 0,
        rank=absent[0] if len(absent) == 1 else None,
        confidence=0.8,
        summary=f"No step {since}, for {seconds:.0f} s, though {'other ' if away else 'the '}ranks are alive{who}.",
        evidence=evidence,
        try_=_ADVICE["stalled"],
        alternatives=_ALTERNATIVES["stalled"],
    )


def _ranks(ranks: Sequence[int]) -> str:
    """At most eight of them by name."""
    named = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {named}"
