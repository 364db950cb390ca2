"""A step's part on the device reads nothing back, and takes as many kernels for a large model as for a small one.

Tensors on the meta device have shapes and no values: whatever would wait for a value raises there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from foreshock._arithmetic.device import DeviceArithmetic
from foreshock._arithmetic.parameters import ParameterPlan, plan_parameters
from foreshock._control.apply import Apply, DryRun
from foreshock._control.clip import AdaptiveClip, Clip, NormClip, ValueClip
from foreshock._control.decide import Decide
from foreshock._control.optimizer import OptimizerControl
from foreshock._measure import shards
from foreshock._measure.measure import Measure
from foreshock._measure.rank_sums import SUM_FIELDS, RankSums
from foreshock._measure.shards import ShardedMeasure, ShardSums
from foreshock._measure.weights import EVERY_STEPS
from foreshock._output.record import Record
from foreshock._step import Observation, Step
from foreshock_protos.columns import MEASURED_NAMES
from foreshock_recorder.layout import Layout

META = torch.device("meta")
CLIPS = [None, NormClip(max_norm=1.0), ValueClip(clip_value=1.0), AdaptiveClip(max_norm=1.0)]


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that are not views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Rank:
    """The parts of a step in the order of `ActiveWatch`, without process group and ring."""

    def __init__(self, layers: int, clip: Clip | None) -> None:
        self.model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))).to(META)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=False)
        self.plan: ParameterPlan = plan_parameters(self.model, self.optimizer)
        self.arithmetic = DeviceArithmetic(META)
        self.control = OptimizerControl(self.optimizer, self.arithmetic, self.plan.parameters)
        self.measure = Measure(
            self.plan, self.optimizer, self.arithmetic, self.control, local_norms=True, single=False, views=False
        )
        self.decide = Decide(self.arithmetic, META, clip=clip, skip=False)
        self.apply, self.dry_run = (
            Apply(self.arithmetic, self.control, clip),
            DryRun(self.arithmetic, self.control, clip),
        )
        ring: Any = SimpleNamespace(layout=Layout(len(self.plan.layers), 0))
        self.record = Record(ring, self.arithmetic)
        for parameter in self.plan.parameters:
            parameter.grad = torch.empty_like(parameter)

    def step(self, sequence: int) -> Tensor:
        step = Step(sequence=sequence, number=sequence, learning_rate=0.1)
        scale = self.arithmetic.constant(1.0)
        assert self.measure.local is not None
        self.measure.local.measure(self.measure.order)
        self.measure.edits.backward_ended(1, 1)
        self.measure.edits.compare(step)
        self.measure.measure(step)
        assert step.summary is not None
        step.loss_scale = step.found_inf = scale
        step.summary = self.arithmetic.unscaled(step.summary, scale)
        self.decide.decide(step)
        self.dry_run.apply(step)
        self.apply.apply(step)
        row = self.record._row(step)
        assert isinstance(row, Tensor)
        return row


def steps(rank: Rank) -> Iterator[Counter[str]]:
    """What each of some steps takes: both that look closer and that do not."""
    for sequence in (1, 2, 3, EVERY_STEPS + 1):
        with Kernels() as kernels:
            row = rank.step(sequence)
        assert row.shape == (len(MEASURED_NAMES) + 2 * len(rank.plan.layers),)
        yield kernels.counts


@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_a_step_reads_nothing_back_and_takes_the_same_kernels_whatever_the_model(clip: Clip | None) -> None:
    small, large = (list(steps(Rank(layers, clip))) for layers in (2, 40))
    # The third step looks at nothing that only some steps look at.
    assert small[2] == large[2]
    assert small[2].total() <= (150 if isinstance(clip, AdaptiveClip) else 90), "docs/architecture.md says so"


@pytest.mark.parametrize("told", [False, True])
def test_what_a_rank_adds_to_the_sum_reads_nothing_back(told: bool) -> None:
    rank = Rank(2, None)
    rank.step(1)
    local = rank.measure.local
    assert local is not None
    sums = object.__new__(RankSums)
    sums._arithmetic = rank.arithmetic
    sums._zero, sums._one = rank.arithmetic.constant(0.0), rank.arithmetic.constant(1.0)
    loss = torch.empty((), dtype=torch.float64, device=META) if told else None
    assert sums.contribution(local.summary, loss).shape == (len(SUM_FIELDS),)


def sharded_step(layers: int) -> Counter[str]:
    """What the third step of a sharded model takes, as if each rank had whole parameters: without the all-reduce."""
    rank = Rank(layers, NormClip(max_norm=1.0))
    group: Any = None
    sums = ShardSums(dict(rank.model.named_parameters()), group, 2, rank.arithmetic)
    measure = ShardedMeasure(rank.plan, rank.optimizer, rank.arithmetic, rank.control, sums)
    counts: Counter[str] = Counter()
    for sequence in (1, 2, 3):
        step = Step(sequence=sequence, number=sequence, learning_rate=0.1)
        step.loss_scale = rank.arithmetic.constant(1.0)
        with Kernels() as kernels:
            sums.prepare(sequence, None, Observation(step=None, loss=step.loss_scale))
            sums.measure()
            sums._sums, sums._next = sums._next, torch.zeros_like(sums._next)
            measure.edits.backward_ended(1, 1)
            measure.edits.compare(step)
            measure.measure(step)
            rank.decide.decide(step)
            rank.apply.apply(step)
            rank.record.sums = sums
            rank.record._row(step)
        counts = kernels.counts
    return counts


def test_a_sharded_models_step_reads_nothing_back_and_takes_the_same_kernels_whatever_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "shard_of", lambda tensor: tensor)
    small, large = sharded_step(2), sharded_step(40)
    assert small == large and small.total() <= 90


def test_a_read_back_would_be_found() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(torch.empty((), device=META))
