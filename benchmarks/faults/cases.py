"""The cases of the corpus: what is trained, what is put in, and what a person who knows would call the outcome."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

Part = Literal["tune", "test"]
Kind = Literal["failing", "healthy", "recovering"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One job."""

    name: str
    part: Part
    kind: Kind
    fault: str
    """What was put in: a class of causes.py, or what these settings do."""
    cause: str
    """The verdict that is right; `healthy` where nobody should be told."""
    root: str | None = None
    """The likely root that is right, of an explosion."""
    model: str
    loss: Literal["square", "huber", "entropy"] = "square"
    ranks: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    loss_scale: float = 2.0**16
    """To begin with, at fp16."""
    optimizer: Literal["sgd", "momentum", "adamw", "lion", "muon"] = "momentum"
    rate: float = 0.01
    schedule: str = "constant"
    at: int = 0
    """Step at which something happens."""
    factor: float = 1.0
    """How much of it."""
    clip: float | None = None
    steps: int = 300
    batch: int = 16
    length: int = 20
    """Of sequences."""
    noise: float = 0.1
    """Standard deviation of what the targets cannot be told by."""
    tail: float = 0.0
    """Degrees of freedom of the inputs' distribution; 0: normal."""
    seed: int = 1
    checkpoint_every: int = 0
    """Go back to the last of these where weights are no longer finite."""
    restarts: tuple[int, ...] = ()
    """Steps after which the job goes back to its last checkpoint on purpose."""
    relaunches: tuple[int, ...] = ()
    """Steps after which the job ends, and the next attempt of the run resumes from its last checkpoint."""

    def rate_at(self, step: int) -> float:
        """The learning rate."""
        after = max(0, step - self.at)
        factors: dict[str, float] = {
            "constant": 1.0,
            "warm_up": min(1.0, (step + 1) / max(1, self.at)),
            "cosine": min(1.0, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / self.steps))),
            "stable_decay": min(1.0, (step + 1) / 50, (self.steps - step) / (0.2 * self.steps)),
            "runaway": 1.6 ** min(after, 100),
            "jump": 1.0 if step < self.at else self.factor,
            "ramp": self.factor ** (after / 100),
            "drops": 0.3 ** (3 * step // self.steps),
            "spell": self.factor if self.at <= step % 400 < self.at + 3 else 1.0,
        }
        return self.rate * factors[self.schedule]

    def batch_at(self, step: int) -> int:
        """Size of a batch."""
        return 4 * self.batch if self.fault == "larger_batch" and step >= self.at else self.batch

    def pieces_at(self, step: int) -> int:
        """Batches that are accumulated into one step."""
        return 4 if self.fault == "accumulation" and step >= self.at else 1


def _explosions() -> Iterator[dict[str, Any]]:
    jump = {"fault": "rate_jump", "root": "learning_rate", "schedule": "jump"}
    yield jump | {"model": "plain_mlp", "rate": 0.02, "factor": 60.0, "at": 150}
    yield jump | {"model": "plain_cnn", "rate": 0.01, "factor": 200.0, "at": 120, "ranks": 2}
    yield jump | {"model": "transformer", "rate": 0.05, "factor": 60.0, "at": 140}
    yield jump | {"model": "mlp", "rate": 0.02, "factor": 200.0, "at": 200, "precision": "bf16"}
    ramp = {"fault": "rate_ramp", "root": "learning_rate", "schedule": "ramp", "at": 60, "steps": 900}
    yield ramp | {"model": "plain_mlp", "rate": 0.02, "factor": 4.0}
    yield ramp | {"model": "plain_cnn", "rate": 0.01, "factor": 6.0, "ranks": 2}
    yield ramp | {"model": "transformer", "rate": 0.05, "factor": 4.0}
    yield ramp | {"model": "plain_mlp", "rate": 0.05, "factor": 3.0, "optimizer": "sgd", "ranks": 3}
    start = {"fault": "no_warm_up", "root": "learning_rate"}
    yield start | {"model": "plain_mlp", "rate": 1.0}
    yield start | {"model": "plain_cnn", "rate": 1.2, "ranks": 2}
    yield start | {"model": "transformer", "rate": 3.0}
    yield start | {"model": "plain_mlp", "rate": 9.0, "optimizer": "sgd", "ranks": 4}
    large = {"fault": "large_initialisation", "root": "initialization", "rate": 0.005}
    yield large | {"model": "plain_mlp", "factor": 8.0}
    yield large | {"model": "plain_cnn", "factor": 5.0, "ranks": 2}
    yield large | {"model": "plain_mlp", "factor": 8.5, "optimizer": "sgd", "rate": 0.01}
    yield large | {"model": "plain_cnn", "factor": 5.5, "ranks": 2}
    deep = {"fault": "no_normalisation", "root": "normalization", "model": "deep_mlp", "factor": 1.0, "steps": 600}
    yield deep | {"rate": 0.3}
    yield deep | {"rate": 0.3, "ranks": 2}
    yield deep | {"rate": 0.4}
    yield deep | {"rate": 0.35, "precision": "bf16"}
    long = {"fault": "long_sequence", "root": "recurrent", "model": "relu_rnn", "steps": 900, "factor": 1.0}
    yield long | {"length": 40, "rate": 2.5}
    yield long | {"length": 40, "rate": 3.0}
    yield long | {"length": 40, "rate": 6.0, "ranks": 2}
    yield long | {"length": 60, "rate": 2.5}


def _quiet() -> Iterator[dict[str, Any]]:
    """Not finite out of the blue, at the first step or later."""
    for model, ranks in (("plain_mlp", 1), ("plain_cnn", 2), ("plain_mlp", 4), ("plain_cnn", 1)):
        yield _sudden("unshifted_softmax", model, ranks, loss="entropy", factor=1000.0)
        yield _sudden("log_of_zero", model, ranks, loss="entropy", factor=1000.0)
    for model, ranks in (("mlp", 1), ("lstm", 2), ("cnn", 3), ("rnn", 1)):
        yield _sudden("division_by_zero", model, ranks)
        yield _sudden("missing_value", model, ranks)
        yield _sudden("missing_value", model, ranks, cause="first_step_nonfinite", at=0, steps=20)
    for model, ranks in (("mlp", 2), ("lstm", 2), ("cnn", 3), ("plain_mlp", 4)):
        yield _sudden("bad_batch", model, ranks)
        # A gate swallows an Inf: the loss stays finite, the gradient does not.
        kind = {"cause": "bad_rank"} if model == "lstm" else {}
        yield _sudden("infinite_batch", model, ranks, **kind)
        # All bits of the exponent: not finite at once. All but the lowest: 1e37, and finite.
        yield _sudden("bit_flip", model, ranks, cause="bad_rank", factor=0.5)
        yield _sudden("bit_flip", model, ranks, cause="bad_rank", factor=2.0)


def _sudden(fault: str, model: str, ranks: int, **changes: Any) -> dict[str, Any]:
    return {"fault": fault, "cause": "sudden_nonfinite", "model": model, "ranks": ranks, "at": 120} | changes


def _half() -> Iterator[dict[str, Any]]:
    for model in ("mlp", "cnn", "plain_mlp", "transformer"):
        half = {"model": model, "precision": "fp16", "steps": 400, "optimizer": "adamw", "rate": 0.002}
        yield half | {"fault": "fp16_overflow", "kind": "recovering", "cause": "amp_overflow", "loss_scale": 2.0**20}
        yield half | {"fault": "scale_collapse", "cause": "amp_scale_collapse", "at": 150}


def _check_faults() -> Iterator[dict[str, Any]]:
    """Nothing is infinite, and yet."""
    for model, ranks, rate in (("mlp", 2, 0.01), ("transformer", 2, 0.05), ("cnn", 4, 0.01), ("lstm", 3, 0.02)):
        yield {"fault": "shared_data", "cause": "duplicate_data", "model": model, "ranks": ranks, "rate": rate}
    for model, ranks in (("mlp", 2), ("transformer", 2), ("cnn", 3), ("lstm", 4)):
        drift = {"fault": "replica_drift", "cause": "replica_drift", "model": model, "ranks": ranks}
        yield drift | {"at": 250, "steps": 600}
    for rate, optimizer in ((0.01, "momentum"), (0.05, "sgd"), (0.001, "adamw"), (0.02, "momentum")):
        sinks = {"fault": "vanishing_gradients", "cause": "vanishing_gradients", "model": "deep_sigmoid"}
        yield sinks | {"rate": rate, "optimizer": optimizer}
    for model, rate in (("mlp", 0.02), ("rnn", 0.02), ("lstm", 0.04), ("lstm", 0.03)):
        climbs = {"fault": "ascent", "cause": "loss_divergence", "loss": "huber", "model": model}
        yield climbs | {"rate": rate, "at": 250, "steps": 900, "clip": 0.5, "batch": 1, "noise": 4.0}
    for model, ranks in (("mlp", 2), ("cnn", 3), ("lstm", 4), ("transformer", 2)):
        yield {"fault": "dead_rank", "cause": "rank_lost", "model": model, "ranks": ranks, "at": 120}
        yield {"fault": "stalled_rank", "cause": "stalled", "model": model, "ranks": ranks, "at": 120}


def _healthy() -> Iterator[dict[str, Any]]:
    steps = 1400
    models = ("mlp", "cnn", "rnn", "lstm", "transformer", "plain_mlp")
    for model in models:
        vision = {"model": model, "steps": steps, "rate": 0.05 if model == "transformer" else 0.01}
        yield vision | {"fault": "plain"}
        yield vision | {"fault": "noisy", "batch": 3}
        yield vision | {"fault": "warm_up", "schedule": "warm_up", "at": 200, "rate": 0.02}
        yield vision | {"fault": "cosine", "schedule": "cosine", "rate": 0.03}
        yield vision | {"fault": "rate_drops", "schedule": "drops", "rate": 0.02}
        yield vision | {"fault": "planned_jump", "schedule": "jump", "at": 600, "factor": 3.0, "rate": 0.005}
        yield vision | {"fault": "larger_batch", "at": 600}
        yield vision | {"fault": "accumulation", "at": 600, "batch": 4}
        yield vision | {"fault": "restart", "checkpoint_every": 250, "restarts": (400, 900)}
    for model in ("mlp", "cnn", "lstm"):
        yield {"fault": "heavy_tailed", "model": model, "steps": steps, "tail": 3.0, "loss": "entropy"}
        yield {"fault": "heavy_tailed", "model": model, "steps": steps, "tail": 4.0, "loss": "huber"}
        yield {"fault": "harder_data", "model": model, "steps": steps, "at": 700, "factor": 1.5, "loss": "entropy"}
        yield {"fault": "evaluation_pauses", "model": model, "steps": 300}
        yield {"fault": "adamw", "model": model, "steps": steps, "optimizer": "adamw", "rate": 0.002}
        yield {"fault": "tiny_batch", "model": model, "steps": steps, "batch": 1 if model != "cnn" else 2}
        yield {"fault": "bf16", "model": model, "steps": steps, "precision": "bf16"}
        yield {"fault": "clipped", "model": model, "steps": steps, "clip": 0.2, "rate": 0.02}
    yield {"fault": "dropout", "model": "dropout_transformer", "steps": steps, "rate": 0.05}
    yield {"fault": "adamw", "model": "transformer", "steps": steps, "optimizer": "adamw", "rate": 0.003}
    for model, ranks in (("mlp", 2), ("cnn", 2), ("lstm", 4), ("transformer", 3)):
        yield {"fault": "several_ranks", "model": model, "ranks": ranks, "steps": 500}
        yield {"fault": "large_batch", "model": model, "ranks": 2, "steps": 300, "batch": 128}


def _recovering() -> Iterator[dict[str, Any]]:
    steps = 1500
    for model in ("mlp", "cnn", "lstm", "plain_mlp"):
        back = {"model": model, "steps": steps, "kind": "recovering"}
        yield back | {"fault": "hard_batches", "at": 150, "factor": 30.0, "clip": 0.5}
        yield back | {"fault": "rate_spell", "schedule": "spell", "at": 200, "factor": 20.0, "clip": 0.5}
        yield back | {"fault": "missing_value", "cause": "sudden_nonfinite", "at": 400, "checkpoint_every": 100}
        # Half precision has no LSTM on a CPU.
        half = "transformer" if model == "lstm" else model
        yield back | {"fault": "fp16_scaler", "precision": "fp16", "model": half}


def _starts_and_ends() -> Iterator[dict[str, Any]]:
    """Explosions in the first steps that stay finite, after a long decay, or with a rate that runs away; silence."""
    cold = {"fault": "cold_explosion", "cause": "loss_divergence", "root": "learning_rate"}
    yield cold | {"model": "plain_mlp", "optimizer": "adamw", "rate": 1.0}
    yield cold | {"model": "plain_mlp", "optimizer": "lion", "rate": 0.3, "loss": "entropy"}
    yield cold | {"model": "transformer", "optimizer": "lion", "rate": 1.0}
    yield cold | {"model": "cnn", "optimizer": "lion", "rate": 0.5, "ranks": 2}
    late = {"fault": "late_jump", "root": "learning_rate", "schedule": "jump", "noise": 0.0, "at": 400, "steps": 600}
    yield late | {"model": "plain_mlp", "rate": 0.05, "factor": 60.0}
    yield late | {"model": "plain_cnn", "rate": 0.02, "factor": 150.0, "ranks": 2}
    runaway = {"fault": "rate_runaway", "root": "learning_rate", "schedule": "runaway", "at": 150}
    yield runaway | {"model": "plain_mlp", "rate": 0.01}
    yield runaway | {"model": "transformer", "rate": 0.05}
    yield runaway | {"model": "plain_cnn", "rate": 0.01, "ranks": 2}
    for model in ("mlp", "lstm"):
        yield {"fault": "unobserved", "cause": "missing_loss", "model": model, "at": 120, "steps": 200}
    start = {"fault": "fp16_start", "kind": "recovering", "cause": "amp_overflow", "precision": "fp16"}
    for model in ("mlp", "cnn", "transformer"):
        yield start | {"model": model, "loss_scale": 2.0**32, "optimizer": "adamw", "rate": 0.002, "steps": 200}
    calm = {"kind": "healthy", "cause": "healthy", "steps": 1000}
    for model in ("mlp", "cnn", "transformer", "lstm"):
        yield calm | {
            "fault": "stable_decay",
            "model": model,
            "optimizer": "adamw",
            "schedule": "stable_decay",
            "rate": 0.004,
        }
        yield calm | {"fault": "lion", "model": model, "optimizer": "lion", "schedule": "cosine", "rate": 0.001}
    yield late | {"model": "plain_mlp", "rate": 0.03, "factor": 100.0}
    yield late | {"model": "plain_cnn", "rate": 0.03, "factor": 100.0}
    yield runaway | {"model": "plain_mlp", "rate": 0.02, "optimizer": "sgd"}
    for model, rate in (("cnn", 0.01), ("transformer", 0.05)):
        yield {"fault": "unobserved", "cause": "missing_loss", "model": model, "rate": rate, "at": 150, "steps": 220}
    yield start | {"model": "plain_mlp", "loss_scale": 2.0**32, "optimizer": "adamw", "rate": 0.002, "steps": 200}


def _zero_losses_and_rollbacks() -> Iterator[dict[str, Any]]:
    """Losses whose value says nothing, jumps right after a rollback, and Muon."""
    calm = {"kind": "healthy", "cause": "healthy", "steps": 1000}
    for model, penalty in (("mlp", 0.0), ("cnn", 1e-3), ("transformer", 0.0), ("lstm", 1e-2)):
        yield calm | {"fault": "zero_loss", "model": model, "factor": penalty, "rate": 0.02}
        yield calm | {"fault": "muon", "model": model, "optimizer": "muon", "schedule": "cosine", "rate": 0.01}
    jump = {"root": "learning_rate", "schedule": "jump"}
    for model, rate, factor in (("plain_mlp", 0.02, 60.0), ("plain_cnn", 0.01, 200.0), ("plain_mlp", 0.03, 80.0)):
        yield jump | {"fault": "zero_loss_jump", "model": model, "rate": rate, "factor": factor, "at": 200}
    yield jump | {"fault": "zero_loss_jump", "model": "transformer", "rate": 0.05, "factor": 60.0, "at": 200}
    back = jump | {"fault": "rollback_jump", "at": 312, "steps": 400, "checkpoint_every": 250, "restarts": (300,)}
    for model, rate, factor in (("plain_mlp", 0.02, 60.0), ("plain_cnn", 0.01, 200.0), ("plain_mlp", 0.03, 80.0)):
        yield back | {"model": model, "rate": rate, "factor": factor}
    yield back | {"model": "transformer", "rate": 0.05, "factor": 60.0}


def _relaunches() -> Iterator[dict[str, Any]]:
    """Several attempts in one run: calm ones, and a jump of the rate right after the next attempt has begun."""
    calm: dict[str, Any] = {"fault": "relaunch", "kind": "healthy", "cause": "healthy", "steps": 1000}
    calm |= {"checkpoint_every": 100, "relaunches": (180, 410)}
    yield calm | {"model": "mlp", "batch": 3}
    yield calm | {"model": "cnn", "ranks": 2}
    yield calm | {"model": "lstm", "optimizer": "adamw", "rate": 0.002}
    yield calm | {"model": "transformer", "optimizer": "adamw", "rate": 0.003, "schedule": "cosine"}
    jump: dict[str, Any] = {"fault": "relaunch_jump", "root": "learning_rate", "schedule": "jump"}
    jump |= {"steps": 400, "checkpoint_every": 250, "relaunches": (255,)}
    yield jump | {"model": "plain_mlp", "rate": 0.02, "factor": 60.0, "at": 258}
    yield jump | {"model": "plain_cnn", "rate": 0.01, "factor": 100.0, "at": 258, "ranks": 2}
    # With the wrong rate from its first step on.
    jump |= {"at": 250, "relaunches": (250,)}
    yield jump | {"model": "plain_mlp", "rate": 0.03, "factor": 80.0}
    yield jump | {"model": "transformer", "rate": 0.05, "factor": 60.0}


_DEFAULTS = {"kind": "failing", "cause": "exploding_gradients"}
_UNSEEN = {"lstm": "gru", "cnn": "mixer"}
"""Architectures of the test part, in place of those that tuning has seen."""


def cases(part: Part) -> list[Case]:
    """All of a part. The test part has other seeds, and architectures that the tuning part has not."""
    failing = [*_explosions(), *_quiet(), *_half(), *_check_faults()]
    calm = [{"kind": "healthy", "cause": "healthy"} | each for each in _healthy()]
    back = [{"cause": "healthy"} | each for each in _recovering()]
    first = 1001 if part == "test" else 1
    made = []
    # Last, because the place of a case is its seed.
    added = [*_starts_and_ends(), *_zero_losses_and_rollbacks(), *_relaunches()]
    for number, values in enumerate([*failing, *calm, *back, *added]):
        case = Case(name="", part=part, **(_DEFAULTS | values))
        case = replace(case, seed=first + number)
        if part == "test":
            case = replace(case, model=_UNSEEN.get(case.model, case.model))
        elif case.kind != "failing":
            case = replace(case, steps=max(300, case.steps // 2))
        made.append(replace(case, name=f"{case.fault}-{case.model}-{case.seed}"))
    return made
