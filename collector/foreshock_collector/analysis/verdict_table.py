"""Every verdict, once: its title and wording, how sure it is, and the alert and condition that it leads to.

Diagnosis decides which entry applies and fills in the numbers. The catalogue, the alert rules, the API, the page and
the tables of the documentation are made from these entries.
"""

from __future__ import annotations

from typing import Literal, get_args

from foreshock_collector.analysis.verdict_entry import Entry, Outcome, Wording

Cause = Literal[
    "healthy",
    "exploding_gradients",
    "amp_overflow",
    "amp_scale_collapse",
    "first_step_nonfinite",
    "unknown",
    "nonfinite_divergence",
    "sudden_nonfinite",
    "bad_rank",
    "nonfinite_gradient",
    "duplicate_data",
    "outlier_rank",
    "replica_drift",
    "vanishing_gradients",
    "loss_divergence",
    "missing_loss",
    "stalled",
    "rank_lost",
    "crashed",
]
_WELL = Outcome(alert="", severity=None, condition="running", finite=True)
_BENIGN = Outcome(alert="", severity=None, condition="running", finite=False)
_EXPLODED = Outcome(alert="ForeshockExplodingGradients", severity="critical", condition="failing", finite=False)
_NONFINITE = Outcome(alert="ForeshockSuddenNonFinite", severity="critical", condition="failing", finite=False)
_FAULT = Outcome(alert="ForeshockTrainingFault", severity="warning", condition="running", finite=True)
_STALLED = Outcome(
    alert="ForeshockRunStalled", severity="warning", condition="stalled", finite=True, names_last_step=True
)
_DIED = Outcome(alert="ForeshockRunDied", severity="critical", condition="failed", finite=True, names_last_step=True)

_CHECK_BATCH = "check the batch of step {step}{where}: NaN, an empty or fully masked sample, a label out of range"
_UNSTABLE_OPERATION = "look for an operation that this batch made unstable: log(0), sqrt at 0, a division by zero"
_SKIP_STEP = "skip such a step and continue, if it stays the only one"
_SMALLER_STEPS = "a smaller learning rate, or one that decays: small steps in a bad direction add up"
_EARLIER_CHECKPOINT = "go back to a checkpoint from before it"
_RESTART = "restart from the last checkpoint"
_OVERFLOW_ADVICE = (
    "use bfloat16: it has the range of float32 and needs no scaler",
    "a smaller learning rate, and clipping by norm: a scale that only falls follows gradients that grow",
    "keep losses, norms and softmax of large values in float32",
)
_KILLED_ADVICE = (
    "check the kernel log of that node for the out-of-memory killer (dmesg), and the scheduler's log for a kill",
    "check the output of the rank: a crash in native code leaves no Python traceback",
    _RESTART,
)
_EXCEPTION_ADVICE = (
    "read the traceback in the output of rank {rank}: it names the line",
    "if it is about data, run the batch of that step alone",
    _RESTART,
)
_OUT_OF_MEMORY_ADVICE = (
    "look for a batch longer than the rest, and for what grows with every step, such as kept losses",
    "a smaller batch, or activation checkpointing",
    _RESTART,
)
_PEER_FAILED_FIRST = ("another rank, its machine or the network failed first",)
_EXPLODED_SUMMARY = (
    "Gradients exploded: from step {onset} the norm climbed from about {usual:.3g} to {peak:.3g}, and {lead} later, at "
    "step {step}, it was no longer finite."
)
_DIED_SUMMARY = "{who} died {when}{first}: {reason}."

VERDICT_TABLE: dict[Cause, Entry] = {
    "healthy": Entry(
        title="Healthy",
        outcome=_WELL,
        observed="none of the below",
        summary="All values are finite up to step {step}.",
        advice=(),
        confidence=1.0,
    ),
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
            _SMALLER_STEPS,
            "look for what changed where the loss began to climb: data, loss weights, a schedule",
            _EARLIER_CHECKPOINT,
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
    "duplicate_data": Entry(
        title="Duplicate data",
        outcome=_FAULT,
        observed="|mean gradient|² above 0.998 of the mean of |local gradient|², and local norms within 0.2 % of "
        "each other, for 20 steps",
        summary="From step {step} on, all ranks compute the same gradient: they see the same data.",
        advice=(
            "give the DataLoader a DistributedSampler, or split the data by rank yourself",
            "call sampler.set_epoch(epoch) at the start of each epoch",
            "seed whatever draws the batches differently on each rank",
        ),
        alternatives=("batches so large that ranks differ by less than rounding",),
        confidence=0.9,
    ),
    "outlier_rank": Entry(
        title="One rank unlike the others",
        outcome=_FAULT,
        observed="one rank's local norm above ten times the median of the others', for 20 steps",
        summary="Since step {step} the gradient of rank {rank} has been out of proportion to those of the others.",
        advice=(
            "check the data of that rank: another scale, another file, labels that do not belong to it",
            "look for what that rank does differently: another loss weight, precision or batch size",
            "move it to another machine; if the fault does not follow, the device is to blame",
        ),
        alternatives=("data that are meant to be harder on that rank",),
        confidence=0.8,
    ),
    "replica_drift": Entry(
        title="Replicas drifted apart",
        outcome=_FAULT,
        observed="weight fingerprints that differ between ranks (computed every hundred steps)",
        summary="At step {step} the weights of the ranks differ: the ranks train different models{divergent}.",
        advice=(
            "stop, and go back to a checkpoint from before that step: what is saved now is the model of one rank",
            "look for what one rank does to its weights alone: a step `if rank == 0`, a clip, a loaded checkpoint",
            "if nothing does, suspect the memory of that rank's device and move the rank to another machine",
        ),
        confidence=0.95,
    ),
    "vanishing_gradients": Entry(
        title="Vanishing gradients",
        outcome=_FAULT,
        observed="a layer below 1e-5 of the largest layer's norm for 100 steps, or a norm at 1e-4 of its initial "
        "value with at least half of the initial loss",
        summary="Gradients have all but vanished since step {step}{in_layer}.",
        advice=(
            "ReLU, GELU or another activation that does not saturate, in place of sigmoid or tanh",
            "normalization (LayerNorm, BatchNorm) or residual connections, so that early layers get a gradient",
            "an initialization that fits the activation (Xavier, He)",
        ),
        alternatives=("layers that are meant to learn nothing",),
        confidence=0.8,
    ),
    "loss_divergence": Entry(
        title="Loss diverges",
        outcome=_FAULT,
        observed="a loss half above its best after 24 steps of steady climb; or at twice its best for 100 steps and "
        "still rising, without a build-up; or at three times the first loss for 20 steps, after both loss and norm "
        "rose so high in the first 25",
        summary="The loss has climbed since step {step}, and no gradient build-up explains it.",
        advice=(
            _SMALLER_STEPS,
            "look for what changed at that step: data, loss weights, regularization, a schedule",
            _EARLIER_CHECKPOINT,
        ),
        alternatives=("data that became permanently harder",),
        confidence=0.7,
        variants={
            "from the start": Wording(
                summary="Loss and gradients exploded at step {step} and stay finite: the model has not learned since.",
                advice=(
                    "a smaller learning rate, with a warm-up: the first updates destroyed the weights",
                    "start again: weights that have exploded rarely recover",
                    "clip by norm, near that of the first steps",
                ),
                alternatives=("an initialization so large that the first updates overshoot",),
                confidence=0.9,
            )
        },
    ),
    "missing_loss": Entry(
        title="Loss missing",
        outcome=_FAULT,
        observed="no loss for 20 steps, and three times as many as ever before, although steps go on",
        summary="No loss has been observed since step {step}, although steps go on: nothing is known of the training.",
        advice=(
            "find out why the script no longer observes it: a condition, a caught exception, a phase of its own",
            "if a log shows nothing where the loss was: pandas, among others, writes NaN as nothing",
        ),
        alternatives=("a loss that is meant to be observed in one phase only",),
        confidence=0.9,
    ),
    "stalled": Entry(
        title="Stalled",
        outcome=_STALLED,
        observed="ranks report but make no step for 20 times the run's median step time, at least 2 and at most 30 "
        "minutes; 10 minutes until the attempt has made ten steps",
        summary="No step {since}, for {seconds:.0f} s, although {alive} alive{suspects}.",
        advice=(
            "dump the stacks of all ranks (py-spy dump --pid): look at the one that is not in a collective",
            "look for a rank that waits for data or a lock, or that runs an evaluation without the others",
            "set a timeout on the process group, so that a hang ends by itself",
        ),
        alternatives=("a long evaluation or checkpoint",),
        confidence=0.8,
    ),
    "rank_lost": Entry(
        title="Rank lost",
        outcome=_DIED,
        observed="a rank's process ended without reporting how, or the run has been silent for 15 minutes",
        summary="Rank {rank} was lost {when}: its process ended without reporting why.",
        advice=_KILLED_ADVICE,
        confidence=0.9,
        variants={
            "silent": Wording(
                summary="{who} fell silent {when}: nothing has been received from {them}{duration}.",
                advice=(
                    "check the node: is it up, and does its training process still run?",
                    "if training continues, check its recorder and the network between it and the collector",
                    "otherwise restart from the last checkpoint, without that node",
                ),
                alternatives=("training continues, and only the connection to the collector is down",),
                confidence=0.6,
            )
        },
    ),
    "crashed": Entry(
        title="Crashed",
        outcome=_DIED,
        observed="an exception, or a known signal or exit code, ended a rank, and no open failure explains it",
        summary=_DIED_SUMMARY,
        advice=_KILLED_ADVICE,
        confidence=0.95,
        variants={
            "exception": Wording(summary=_DIED_SUMMARY, advice=_EXCEPTION_ADVICE, confidence=0.95),
            "lost peer": Wording(
                summary=_DIED_SUMMARY,
                advice=_EXCEPTION_ADVICE,
                alternatives=_PEER_FAILED_FIRST,
                confidence=0.5,
            ),
            "lost peer, out of memory": Wording(
                summary=_DIED_SUMMARY,
                advice=_OUT_OF_MEMORY_ADVICE,
                alternatives=_PEER_FAILED_FIRST,
                confidence=0.5,
            ),
            "out of memory": Wording(summary=_DIED_SUMMARY, advice=_OUT_OF_MEMORY_ADVICE, confidence=0.95),
        },
    ),
}

assert VERDICT_TABLE.keys() == set(get_args(Cause))
