"""Verdicts on troubles without a NaN: what lasts (faults.py), a rank that is lost, a run that stands still. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from foreshock_collector.faults import Change
from foreshock_collector.steps import ModelFacts
from foreshock_collector.verdicts import Cause, Verdict

_SUMMARIES: dict[Cause, str] = {
    "duplicate_data": "From step {step} on, all ranks compute the same gradient: they see the same data.",
    "bad_rank": "Since step {step} the gradient of rank {rank} is out of all proportion to the others'.",
    "replica_drift": "At step {step} the weights of the ranks differ: they train different models{who}.",
    "vanishing_gradients": "Since step {step} gradients have all but vanished{where}.",
    "loss_divergence": "The loss has climbed since step {step}, and no gradient build-up explains it.",
}
_CONFIDENCE: dict[Cause, float] = {
    "duplicate_data": 0.9,
    "bad_rank": 0.8,
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
    "bad_rank": (
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
    "rank_lost": (
        "look at the kernel's log of that node for the out-of-memory killer (dmesg), and at the scheduler's for a kill",
        "look at the rank's own output: a crash in native code leaves no Python traceback",
        "restart from the last checkpoint",
    ),
    "stalled": (
        "dump the stacks of all ranks (py-spy dump --pid): the one that is not in a collective is the one to look at",
        "look for a rank that waits for data, for a lock, or in an evaluation that the others do not take part in",
        "set a time-out of the process group, so that a hang ends by itself",
    ),
}
_ALTERNATIVES: dict[Cause, tuple[str, ...]] = {
    "duplicate_data": ("batches so large that ranks differ by less than rounding",),
    "bad_rank": ("data that are meant to be harder on that rank",),
    "vanishing_gradients": ("layers that are meant to learn nothing",),
    "loss_divergence": ("data that became harder for good",),
    "rank_lost": ("somebody ended the job on purpose",),
    "stalled": ("a long evaluation or checkpoint",),
}


def verdict_on_fault(change: Change, attempt: int, model: ModelFacts) -> Verdict:
    """On a trouble that has begun."""
    layer = model.layers[change.layer] if 0 <= change.layer < len(model.layers) else ""
    where = f" in layer {layer}" if layer else ""
    who = f": rank {change.rank} is unlike the others" if change.rank >= 0 else ""
    return _verdict(
        change.cause,
        attempt,
        step=change.step,
        rank=change.rank if change.rank >= 0 else None,
        layer=layer,
        confidence=_CONFIDENCE[change.cause],
        summary=_SUMMARIES[change.cause].format(step=change.step, where=where, who=who, rank=change.rank),
        evidence=change.evidence,
    )


def verdict_on_loss(attempt: int, lost: Sequence[tuple[float, int, int]], world_size: int) -> Verdict:
    """On ranks that ended without a goodbye. lost: when each was noticed, its rank, its last step; in that order."""
    _, rank, step = lost[0]
    evidence = [f"rank {rank} ended at step {step} without a goodbye: killed, or crashed below Python"]
    if len(lost) > 1:
        later = lost[-1][0] - lost[0][0]
        evidence.append(f"{len(lost)} of {world_size} ranks are gone, the last {later:.1f} s after the first")
    together = len(lost) == world_size > 1 and lost[-1][0] - lost[0][0] < 1
    return _verdict(
        "rank_lost",
        attempt,
        step=step,
        rank=rank,
        confidence=0.6 if together else 0.9,
        summary=f"Rank {rank} was lost after step {step}: its process ended without a goodbye.",
        evidence=tuple(evidence),
    )


def verdict_on_stall(attempt: int, step: int, seconds: float, usual: float, missing: Sequence[int]) -> Verdict:
    """On a run whose ranks are there and make no step. seconds: since the last; usual: what makes a stall.

    missing: ranks that have not finished the newest step that another has.
    """
    evidence = [f"no step for {seconds:.0f} s; {usual:.0f} s would be long for this run", "its ranks still report"]
    if missing:
        evidence.append(f"ranks that have not finished step {step}: {', '.join(map(str, missing))}")
    return _verdict(
        "stalled",
        attempt,
        step=step,
        rank=missing[0] if len(missing) == 1 else None,
        confidence=0.8,
        summary=f"No step since step {step}, for {seconds:.0f} s, though the ranks are alive.",
        evidence=tuple(evidence),
    )


def _verdict(
    cause: Cause,
    attempt: int,
    *,
    step: int,
    rank: int | None,
    confidence: float,
    summary: str,
    evidence: tuple[str, ...],
    layer: str = "",
) -> Verdict:
    return Verdict(
        cause=cause,
        attempt=attempt,
        first_bad_step=step,
        onset_step=None,
        lead_steps=0,
        finite=True,
        rank=rank,
        parameter="",
        layer=layer,
        confidence=confidence,
        summary=summary,
        evidence=evidence,
        try_=_ADVICE[cause],
        alternatives=_ALTERNATIVES.get(cause, ()),
    )
