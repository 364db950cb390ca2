"""Entries of the verdict table for finite values: lasting faults, a run that makes no steps, and ranks that left."""

from __future__ import annotations

from typing import Literal

from foreshock_collector.analysis.failure_entries import EARLIER_CHECKPOINT, SMALLER_STEPS
from foreshock_collector.analysis.verdict_entry import Entry, Outcome, Wording

FaultCause = Literal[
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
"""Name of a verdict on finite values."""

_FAULT = Outcome(alert="ForeshockTrainingFault", severity="warning", condition="running", finite=True)
_STALLED = Outcome(
    alert="ForeshockRunStalled", severity="warning", condition="stalled", finite=True, names_last_step=True
)
_DIED = Outcome(alert="ForeshockRunDied", severity="critical", condition="failed", finite=True, names_last_step=True)

_RESTART = "restart from the last checkpoint"
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
_DIED_SUMMARY = "{who} died {when}{first}: {reason}."

FAULT_ENTRIES: dict[FaultCause, Entry] = {
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
        observed="without a build-up, a loss half above its best after 24 steps of steady climb, or at twice its best "
        "for 100 steps and still rising; or one above the very first loss for 20 steps, after both loss and norm rose "
        "to three times the first within 25",
        summary="The loss has climbed since step {step}, and no gradient build-up explains it.",
        advice=(
            SMALLER_STEPS,
            "look for what changed at that step: data, loss weights, regularization, a schedule",
            EARLIER_CHECKPOINT,
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
