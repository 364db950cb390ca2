"""A step's part on the device reads nothing back, and takes as many kernels for a large model as for a small one.

Tensors on the meta device have shapes and no values: whatever would wait for a value raises there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from foreshock._averaged import AveragedGradient
from foreshock._clip import AdaptiveClip, Clip, NormClip, ValueClip
from foreshock._edits import GradientEdits
from foreshock._kernel import Kernel
from foreshock._local import SUM_FIELDS, LocalNorms, RankSums
from foreshock._numbers import constant
from foreshock._policies import Policies
from foreshock._rows import Row
from foreshock._shadow import Shadow
from foreshock._summary import ParameterPlan, plan_parameters
from foreshock._weights import EVERY_STEPS, Weights, due
from foreshock_protos.columns import MEASURED_NAMES

META = torch.device("meta")
CLIPS = [None, NormClip(max_norm=1.0), ValueClip(clip_value=1.0), AdaptiveClip(max_norm=1.0)]
BUCKETS = 2


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
        self.local, self.averaged = LocalNorms(self.plan), AveragedGradient(self.plan)
        self.policies = Policies(clip=clip, skip=False, device=META)
        self.kernel = Kernel(self.optimizer, clip, self.plan.parameters)
        self.shadow, self.edits = Shadow(clip, META), GradientEdits(self.plan.parameters)
        self.weights = Weights(self.plan, self.optimizer)
        for parameter in self.plan.parameters:
            parameter.grad = torch.empty_like(parameter)
        layers = len(self.plan.layers)
        self.row = Row(len(MEASURED_NAMES) + 2 * layers, layers, META)

    def step(self, sequence: int) -> Tensor:
        scale, parameters = constant(1.0, META), self.plan.parameters
        middle = len(parameters) // BUCKETS
        for number, part in enumerate((parameters[:middle], parameters[middle:])):
            self.local.measure(part, [p.grad for p in part if p.grad is not None], first=number == 0)
        self.local.close()
        self.edits.backward_ended()
        self.edits.before_step()
        gradients = self.averaged.gradients()
        summary = self.averaged.measure(gradients, largest=due(sequence)).unscaled(scale)
        ruling = self.policies.rule(summary.total, learning_rate=0.1, left_out=scale)
        tried = self.shadow.count(ruling, gradients, scale)
        coefficient = self.kernel.follow(ruling, gradients, None)
        row = self.row.filled(
            summary,
            scale=scale,
            coefficient=coefficient,
            found_inf=scale,
            shadow=tried,
            local=self.local.summary,
            sums=None,
            weights=self.weights.look(sequence),
        )
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
    sums = object.__new__(RankSums)
    sums._device, sums._zero, sums._one = META, constant(0.0, META), constant(1.0, META)
    loss = torch.empty((), dtype=torch.float64, device=META) if told else None
    assert sums.contribution(rank.local.summary, loss).shape == (len(SUM_FIELDS),)


def test_a_read_back_would_be_found() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(torch.empty((), device=META))
