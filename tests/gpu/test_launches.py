"""What a step launches and copies on the path of the kernels. Nothing runs: launches are counted instead."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from foreshock._arithmetic.device import DeviceArithmetic
from foreshock._arithmetic.parameters import plan_parameters
from foreshock._control.clip import AdaptiveClip, NormClip
from foreshock._control.optimizer import OptimizerControl
from foreshock._measure import rank_sums
from foreshock._measure.script import observation_of
from foreshock._output.device_record import DeviceRecord
from foreshock._output.pinned_ring import PinnedRing
from foreshock._step import Step
from foreshock_recorder.ring import Ring
from tests.support.cudart import Cudart

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("Triton has wheels for Linux on x86-64 only", allow_module_level=True)

from foreshock._kernels import chunks
from foreshock._kernels import step as kernel_step
from foreshock._kernels.decide import KernelDecide
from foreshock._kernels.launches import StepKernel
from foreshock._kernels.stages import KernelApply, KernelMeasure, KernelRankSums

CPU = torch.device("cpu")
MOST_LAUNCHES, COPIES = 8, 2
READ_BACKS = {"aten._local_scalar_dense.default", "aten.equal.default", "aten.is_nonzero.default"}
COPY = "aten.copy_.default"
NO_LAUNCH = {"aten.empty.memory_format", "aten.detach.default"}


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and str(func) not in NO_LAUNCH:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Work:
    """A collective that is done at once."""

    def is_completed(self) -> bool:
        return True


class Rank:
    """The parts of a step on the kernels' path, in the order of `ActiveWatch`, without a process group."""

    def __init__(self, folder: Path, launched: Counter[str], layers: int, clip: NormClip | AdaptiveClip | None) -> None:
        self._launched = launched
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        plan = plan_parameters(model, self.optimizer)
        self.parameters = plan.parameters
        self.arithmetic = arithmetic = DeviceArithmetic(CPU)
        self.control = OptimizerControl(self.optimizer, arithmetic, plan.parameters)
        ring = Ring.create(folder / "rank.ring", {}, layers=len(plan.layers))
        kernel = StepKernel(len(plan.layers), CPU, clip=clip, skip=False, dry_run=False)
        group: Any = None
        self.sums = KernelRankSums(group, CPU, arithmetic, kernel)
        self.measure = KernelMeasure(
            plan,
            self.optimizer,
            arithmetic,
            self.control,
            kernel=kernel,
            local_norms=True,
            single=False,
            views=False,
        )
        self.decide = KernelDecide(kernel, arithmetic, self.control, self.sums, clip=clip, skip=False, dry_run=False)
        self.apply = KernelApply(arithmetic, self.control, kernel)
        self.record = DeviceRecord(ring, arithmetic, PinnedRing(ring, Cudart()))
        for parameter in plan.parameters:
            parameter.grad = torch.ones_like(parameter)

    def step(self, sequence: int, *, scaled: bool) -> Counter[str]:
        """Launches and copies of one step, of ours and by name."""
        loss, scale, found_inf = torch.tensor([0.5, 4.0, 0.0]).unbind()
        if scaled:
            vars(self.optimizer).update(grad_scale=scale, found_inf=found_inf)
        self._launched.clear()
        with Operations() as operations:
            observation = observation_of(loss, sequence, self.arithmetic)
            assert self.measure.local is not None
            self.measure.local.measure(self.measure.order)
            self.sums.prepare(sequence, self.measure.local, observation)
            self.sums.issue()
            step = Step(sequence=sequence, number=sequence, learning_rate=0.1, observation=observation)
            self.record.begin(step)
            for stage in (self.control.read, self.measure.measure, self.decide.decide, self.apply.apply):
                stage(step)
            step.complete = True
            self.record.write(step)
            self.control.restore()
        found: Counter[str] = operations.counts + self._launched
        return found


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts launches; nothing is run."""
    found: Counter[str] = Counter()

    def counting(name: str) -> dict[Any, Callable[..., None]]:
        class Grids(dict[Any, Callable[..., None]]):
            def __missing__(self, grid: tuple[int]) -> Callable[..., None]:
                return lambda *_, **__: found.update([name])

        return Grids()

    def all_reduce(*_: Any, **__: Any) -> Work:
        found.update(["all_reduce"])
        return Work()

    for module, name in ((chunks, "measure_chunks"), (kernel_step, "finish_step"), (kernel_step, "contribute")):
        monkeypatch.setattr(module, name, counting(name))
    monkeypatch.setattr(rank_sums, "dist", SimpleNamespace(get_backend=lambda _: "nccl", all_reduce=all_reduce))
    return found


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clip", [None, NormClip(max_norm=1.0), AdaptiveClip(max_norm=1.0)], ids=str)
def test_a_step_takes_few_launches_and_two_copies_whatever_the_model(
    tmp_path: Path, launched: Counter[str], clip: NormClip | AdaptiveClip | None, scaled: bool
) -> None:
    found = []
    for layers in (2, 40):
        rank = Rank(tmp_path / str(layers), launched, layers, clip)
        # The first two steps look at the weights too, and the addresses of gradients are sent.
        for sequence in (1, 2):
            rank.step(sequence, scaled=scaled)
        found.append(rank.step(3, scaled=scaled))
    small, large = found
    assert small == large
    assert small.pop(COPY) == COPIES and not small.keys() & READ_BACKS
    assert small["measure_chunks"] == 2 and small["finish_step"] == small["contribute"] == small["all_reduce"] == 1
    assert 5 <= small.total() <= MOST_LAUNCHES, small


def test_gradients_that_have_moved_cost_a_copy_of_their_addresses(tmp_path: Path, launched: Counter[str]) -> None:
    rank = Rank(tmp_path, launched, 2, None)
    for sequence in (1, 2):
        rank.step(sequence, scaled=False)
    kept = rank.parameters[0].grad
    rank.parameters[0].grad = torch.ones_like(rank.parameters[0])
    # Of this rank's own gradient, and of the averaged one.
    assert rank.step(3, scaled=False)[COPY] == COPIES + 2
    assert kept is not None
    assert rank.step(4, scaled=False)[COPY] == COPIES
