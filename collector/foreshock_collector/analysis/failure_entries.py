"""Entries of the verdict table for values that are not finite."""

from __future__ import annotations

from typing import Literal

from foreshock_collector.analysis.verdict_entry import Entry, Outcome, Wording

FailureCause = Literal[
    "exploding_gradients",
    "amp_overflow",
    "amp_scale_collapse",
    "first_step_nonfinite",
    "unknown",
    "nonfinite_divergence",
    "sudden_nonfinite",
    "bad_rank",
    "nonfinite_gradient",
]
"""Name of a verdict on values that are not finite."""

_BENIGN = Outcome(alert="", severity=None, condition="running", finite=False)
_EXPLODED = Outcome(alert="ForeshockExplodingGradients", severity="critical", condition="failing", finite=False)
_NONFINITE = Outcome(alert="ForeshockSuddenNonFinite", severity="critical", condition="failing", finite=False)

_CHECK_BATCH = "check the batch of step {step}{where}: NaN, an empty or fully masked sample, a label out of range"
_UNSTABLE_OPERATION = "look for an operation that this batch made unstable: log(0), sqrt at 0, a division by zero"
_SKIP_STEP = "skip such a step and continue, if it stays the only one"
SMALLER_STEPS = "a smaller learning rate, or one that decays: small steps in a bad direction add up"
EARLIER_CHECKPOINT = "go back to a checkpoint from before it"
_OVERFLOW_ADVICE = (
    "use bfloat16: it has the range of float32 and needs no scaler",
    "a smaller learning rate, and clipping by norm: a scale that only falls follows gradients that grow",
    "keep losses, norms and softmax of large values in float32",
)
_EXPLODED_SUMMARY = (
    "Gradients exploded: from step {onset} the norm climbed from about {usual:.3g} to {peak:.3g}, and {lead} later, at "
    "step {step}, it was no longer finite."
)

FAILURE_ENTRIES: dict[FailureCause, Entry] = {
    "exploding_gradients": Entry(
        title="Exploding gradients",
        outcome=_EXPLODED,
        observed="a build-up or spike in the previous 32 steps, or an earlier climb that never ended; in a run too "
        "young for a history, a last norm at ten times the median of those before; or, at the bad step itself, a "
        "finite loss at ten times the usual",
        summary=_EXPLODED_SUMMARY,
        advice=(),  # depends on the likely root: see advice.py
        alternatives=("one bad batch triggered it",),
        confidence=0.9,
        variants={
            "single spike": Wording(
                summary=_EXPLODED_SUMMARY,
                advice=(),
                alternatives=("the single spike was harmless, and the NaN came suddenly",),
                confidence=0.6,
            ),
            "in one step": Wording(
                summary="Gradients exploded at step {step}: the loss jumped from about {usual:.3g} to {peak:.3g}, and "
                "the gradient of that step was no longer finite.",
                advice=(),
                alternatives=("one bad batch, with values out of range",),
                confidence=0.8,
            ),
        },
    ),
    "amp_overflow": Entry(
        title="Overflow in mixed precision",
        outcome=_BENIGN,
        observed="in a log: the loss stays finite although up to nine gradients in a row do not, or up to 31 at its "
        "start, so a GradScaler skipped their steps",
        summary="The gradient overflowed at step {step}, the step was skipped, and training continued: this is how a "
        "GradScaler finds its scale.",
        advice=("nothing, as long as it stays rare: a GradScaler halves its scale and continues",),
        alternatives=("one bad batch, whose step was skipped",),
        confidence=0.7,
    ),
    "amp_scale_collapse": Entry(
        title="Loss scale collapsed",
        outcome=_NONFINITE,
        observed="the loss scale has halved ten times in a row, or is below 1; in a log: ten gradients in a row are "
        "not finite, and the loss is",
        summary="The gradient still overflows at step {step}, with the loss scale down to {loss_scale:g}.",
        advice=_OVERFLOW_ADVICE,
        confidence=0.8,
        variants={
            "skipped": Wording(
                summary="From step {step} on the gradient keeps overflowing, and every step is skipped.",
                advice=_OVERFLOW_ADVICE,
                confidence=0.8,
            )
        },
    ),
    "first_step_nonfinite": Entry(
        title="Not finite from the first step",
        outcome=_NONFINITE,
        observed="no earlier step was finite, and this is the first or second",
        summary="Not finite from the very first step ({step}){where}: training itself did not cause it.",
        advice=(
            "check the first batch{where} for NaN and Inf: torch.isfinite(batch).all()",
            "look for log(0), sqrt at 0, a division by zero or a fully masked softmax in the model and the loss",
            "check the initialization: its scale, and whether a loaded checkpoint is finite",
            "check the data type: bfloat16 and float32 hold values that float16 cannot",
        ),
        alternatives=("an initialization so large that the first forward pass overflows",),
        confidence=0.9,
    ),
    "unknown": Entry(
        title="Unknown",
        outcome=_NONFINITE,
        observed="only one finite step came before, or the previous record is 50 or more steps older; in a log "
        "without a fault: fewer than 25 rows, or rows that are 50 or more steps apart",
        summary="Not finite at step {step}; the records are too sparse to show what came before.",
        advice=("log the loss and the gradient norm at every step: a climb takes 3 to 8 of them", _CHECK_BATCH),
        confidence=0.3,
        variants={
            "too few": Wording(
                summary="Not finite at step {step}, after {before}: too few to show what came before.",
                advice=(
                    "a smaller learning rate, or a warm-up: the first updates are the largest",
                    _CHECK_BATCH,
                    "check the initialization: its scale, and whether a loaded checkpoint is finite",
                ),
                confidence=0.3,
            ),
            "short": Wording(
                summary="All values are finite up to step {step}; {rows} are too few to show more.",
                advice=("diagnose the log again once it is longer",),
                confidence=0.3,
            ),
            "sparse": Wording(
                summary="All values are finite up to step {step}; rows {apart} apart do not show what happens between.",
                advice=("log the loss and the gradient norm at every step",),
                confidence=0.3,
            ),
        },
    ),
    "nonfinite_divergence": Entry(
        title="Loss diverged until not finite",
        outcome=_NONFINITE,
        observed="the loss had been climbing for a long time, or the norm was not recorded and the loss had spiked",
        summary="The loss climbed until it was no longer finite at step {step}, without a gradient build-up.",
        advice=(
            SMALLER_STEPS,
            "look for what changed where the loss began to climb: data, loss weights, a schedule",
            EARLIER_CHECKPOINT,
        ),
        alternatives=("gradients exploded between two records",),
        confidence=0.6,
    ),
    "sudden_nonfinite": Entry(
        title="Suddenly not finite",
        outcome=_NONFINITE,
        observed="the loss is not finite; names the rank if only one is affected",
        summary="The {what} suddenly became non-finite at step {step}, without an earlier sign.",
        advice=(_CHECK_BATCH, _UNSTABLE_OPERATION, _SKIP_STEP),
        alternatives=("overflow in half precision",),
        confidence=0.75,
        variants={
            "one rank": Wording(
                summary="The {what} suddenly became non-finite at step {step} on rank {rank}, without an earlier sign.",
                advice=(
                    _CHECK_BATCH,
                    _UNSTABLE_OPERATION,
                    _SKIP_STEP,
                    "if rank {rank} is named again with other data, suspect its machine and move it to another one",
                ),
                alternatives=("a faulty device of that rank",),
                confidence=0.9,
            )
        },
    ),
    "bad_rank": Entry(
        title="One bad rank",
        outcome=_NONFINITE,
        observed="the loss is finite, and one rank's own gradient is not; or, at the first sign of an explosion, "
        "the norm of one rank is a thousand times every other's",
        summary="By step {step} the gradient of rank {rank} alone had gone wrong, although its loss had not.",
        advice=(
            "move rank {rank} to another machine, and check the device of the old one: memory errors, overheating",
            "go back to the last checkpoint: the gradient of this step was averaged into every rank",
            _CHECK_BATCH,
        ),
        alternatives=("an operation that this rank's batch made unstable in the backward pass",),
        confidence=0.9,
    ),
    "nonfinite_gradient": Entry(
        title="Gradient not finite",
        outcome=_NONFINITE,
        observed="the loss is finite, and the averaged gradient is not",
        summary="The gradient became non-finite at step {step} although the loss was finite.",
        advice=(
            "find the operation: run the batch of that step under torch.autograd.set_detect_anomaly(True)",
            "look for gradients undefined at the edge of a domain: sqrt or norm at 0, x**p at 0, torch.where over NaN",
            "a gradient that is communicated in half precision overflows beyond 65504: use bfloat16 or float32",
        ),
        alternatives=("a fault in the all-reduce or in a compression hook",),
        confidence=0.8,
    ),
}
