"""Where torch calls the probe: as gradients arrive, at the end of backward, and around the optimizer's step.

With `gradient_as_bucket_view=False`, DDP's default, `p.grad` is this rank's own gradient until a callback of DDP's at
the end of backward replaces it by the average. A callback requested before DDP's sees it: no communication hook is
needed. A model with bucket views or a static graph needs one (`_ddp.py`), which calls `bucket` here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from foreshock._arithmetic.parameters import averaged_parameters
from foreshock._hooks.guard import Guard
from foreshock._log import rank_zero_warn_once
from foreshock._measure.rank_sums import RankSums
from foreshock._torch import GradBucket, after_backward, graph_task_id, in_join, step_pre_hooks, version_of


class BackwardObserver(Protocol):
    """Observes the backward passes of a model. None of its methods raises, but for `guard` in strict mode."""

    guard: Guard

    def arrived(self, parameter: Tensor) -> None:
        """A parameter has its gradient. Called for all in the first pass, later only if few cannot stand for all."""

    def backward_began(self, first: Tensor) -> None:
        """The first of the hooked parameters has its gradient; the others have those of before."""

    def bucket(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, first: bool, last: bool) -> None:
        """A bucket is about to be reduced."""

    def backward_computed(self) -> None:
        """This rank waits for the others from here on: its gradients are computed, and not averaged yet.

        Not called in a pass that only accumulates. With a sharded model, called where a forward pass begins.
        """

    def prepare_sum(self) -> None:
        """The sum over a sharded model's ranks is issued next, before `backward_ended`."""

    def backward_ended(self, *, averaged: bool, sums: bool) -> None:
        """Averages are in place, unless this pass only accumulates. sums: the sum over ranks is issued next."""


@dataclass(slots=True)
class _Task:
    """A part of a backward pass that autograd runs as one task: all of it, unless checkpointing is reentrant."""

    first: weakref.ref[Tensor]
    """First hooked parameter whose gradient arrived in it."""
    version: int
    """Version of that gradient before DDP's averages are put in place."""


class BackwardHooks:
    """Follows the backward passes of one model, and issues the sum over ranks once for each that DDP averages.

    One per model, for the model's life: a rank whose watch has left still takes part in the sums. Holds nothing that
    would keep a model alive, since its parameters hold the hooks.
    """

    def __init__(self, model: nn.Module, after_first_pass: Callable[[nn.Module], None] | None = None) -> None:
        """model: DDP, or that of a process that trains alone. after_first_pass: called once, when DDP has averaged."""
        ddp = model if isinstance(model, DistributedDataParallel) else None
        self._model = weakref.ref(model)
        self._observer: weakref.ref[BackwardObserver] | None = None
        self._sums: RankSums | None = None
        self._by_bucket = False
        self._alone = ddp is None
        """Whether there is nobody to average with: gradients are final at the end of each pass."""
        self._writes_back = ddp is not None and not ddp.gradient_as_bucket_view
        """Whether DDP copies averages into the gradients, so that their version shows whether it has averaged."""
        self._static = ddp is not None and bool(ddp.static_graph)
        """Whether DDP may average before our first callback: in its first pass, it requests its own first."""
        self._unused = ddp is None or bool(ddp.find_unused_parameters)
        """Whether a pass may leave out any parameter: then only hooks on all notice each pass."""
        self._handles: dict[int, RemovableHandle] = {}
        self._order: list[int] = []
        """Hooked parameters, by number, in the order in which they were first seen to arrive."""
        self._all_hooked = True
        self._seen: set[int] = set()
        """Hooked parameters that have arrived in this pass."""
        self._reentrant = False
        """Whether one pass has consisted of several autograd tasks, as under reentrant checkpointing. A callback then
        comes at the end of the task that requested it, before other tasks' gradients have arrived."""
        self._tasks: dict[int, _Task] = {}
        """Tasks of this pass, by autograd's number. One that raised never ends."""
        self._after_first_pass = after_first_pass

    def place(self, observer: BackwardObserver, sums: RankSums | None, *, by_bucket: bool) -> None:
        """Start calling an observer. sums: issued after each averaged pass, on every rank alike, from now on."""
        self._observer, self._sums, self._by_bucket = weakref.ref(observer), sums, by_bucket
        self._hook_all()

    def leave(self) -> None:
        """Stop calling the observer. With sums, the hooks stay: other ranks may still take part in them."""
        self._observer = None
        if self._sums is None:
            self._remove()

    def bucket(self, bucket: GradBucket) -> None:
        """Show a bucket to the observer before it is reduced; issue the sum with the last one."""
        if not self._by_bucket:
            return
        observer = None if self._observer is None else self._observer()
        if observer is not None:
            observer.bucket(bucket.parameters(), bucket.gradients(), first=bucket.index() == 0, last=bucket.is_last())
        # Before this bucket's own reduction: after it, half the sums would still be under way a step later.
        if bucket.is_last() and self._sums is not None:
            self._sums.issue()

    def _hook_all(self) -> None:
        model = self._model()
        assert model is not None
        self._remove()
        # Hooks of a tensor go neither into its copies nor into files, as a module's would.
        self._handles = {
            number: parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self._arrived, number)
            )
            for number, (_, parameter) in enumerate(averaged_parameters(model))
            if parameter.requires_grad
        }
        self._order, self._all_hooked, self._seen = [], True, set()

    def _remove(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def _count(self, error: Exception) -> None:
        observer = None if self._observer is None else self._observer()
        if observer is not None:
            observer.guard.count(error)

    def _hook_few(self) -> None:
        """Keep three hooks: one on each parameter would cost more than the rest of the probe's work in backward."""
        few = {self._order[0], self._order[len(self._order) // 2], self._order[-1]}
        for number in self._handles.keys() - few:
            self._handles.pop(number).remove()
        self._all_hooked = False

    def _arrived(self, number: int, parameter: Tensor) -> None:
        observer = None if self._observer is None else self._observer()
        task = graph_task_id()
        if number in self._seen:
            # The pass before ended without the others.
            self._seen, self._tasks = set(), {}
        if task not in self._tasks:
            self._reentrant |= bool(self._seen) and not self._unused
            began = not self._seen
            grad = parameter.grad
            self._tasks[task] = _Task(weakref.ref(parameter), -1 if grad is None else version_of(grad))
            if observer is not None and began:
                observer.backward_began(parameter)
            try:
                after_backward(partial(self._computed, task))
            except Exception as error:
                self._count(error)
        self._seen.add(number)
        if len(self._order) < len(self._handles) and number not in self._order:
            self._order.append(number)
            if observer is not None:
                observer.arrived(parameter)

    def _computed(self, number: int) -> None:
        observer = None if self._observer is None else self._observer()
        task, model = self._tasks.get(number), self._model()
        first = None if task is None else task.first()
        if task is not None and first is not None and first.grad is not None and not self._static:
            task.version = version_of(first.grad)
        whole = self._unused or len(self._seen) >= len(self._handles)
        if whole:
            self._seen = set()
        if observer is not None and whole and model is not None and (self._alone or model.require_backward_grad_sync):
            observer.backward_computed()
        if whole or self._writes_back:
            # DDP has requested its own callback after ours, and waits there: go behind it once more.
            try:
                after_backward(partial(self._ended, number))
            except Exception as error:
                self._count(error)

    def _ended(self, number: int) -> None:
        observer = None if self._observer is None else self._observer()
        task, model = self._tasks.pop(number, None), self._model()
        first = None if task is None else task.first()
        if model is None:
            # The parameters live on without it.
            self._remove()
        if model is None or task is None or first is None:
            return
        averaged = self._alone or bool(model.require_backward_grad_sync)
        if self._writes_back:
            averaged = first.grad is not None and version_of(first.grad) != task.version
        if averaged:
            self._tasks = {}
        # Within join, a rank that has run out of inputs makes no backward pass, so none issues a sum.
        summed = averaged and self._sums is not None and not self._by_bucket
        sums = summed and isinstance(model, DistributedDataParallel) and not in_join(model)
        if observer is not None:
            observer.backward_ended(averaged=averaged, sums=sums)
            if averaged and self._after_first_pass is not None:
                first_pass, self._after_first_pass = self._after_first_pass, None
                observer.guard.run(first_pass, model)
            if averaged and self._all_hooked and not self._unused and not self._reentrant:
                observer.guard.run(self._hook_few)
            elif averaged and self._reentrant and not self._all_hooked:
                observer.guard.run(self._hook_all)
        if sums and self._sums is not None:
            self._sums.issue()


class StepObserver(Protocol):
    """Acts around the optimizer's step."""

    def before_step(self) -> None:
        """The gradients are final."""

    def after_step(self, *_: Any) -> None:
        """The optimizer has stepped."""


class StepHooks:
    """Hooks before and after the step of one optimizer.

    Both stay out of graphs: a compiled `optimizer.step` would otherwise silently lose the clipping.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, observer: StepObserver, *, clips: bool) -> None:
        self._observer = observer
        self._clips = clips
        self._before = optimizer.register_step_pre_hook(outside_graphs(self._pre))
        self._after = optimizer.register_step_post_hook(outside_graphs(observer.after_step))
        self._all_before = step_pre_hooks(optimizer)

    def remove(self) -> None:
        """Remove both hooks."""
        self._before.remove()
        self._after.remove()

    def _pre(self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        # A hook that runs after ours and edits gradients would undo the clipping.
        if self._clips and next(reversed(self._all_before)) != self._before.id:
            rank_zero_warn_once(
                "hook order", "another step pre-hook was registered after attach; its changes are not clipped"
            )
        if closure is None:
            self._observer.before_step()
            return None

        def closure_then_observe() -> Any:
            # The gradients of step(closure) do not exist before the closure has run.
            loss = closure()
            self._observer.before_step()
            return loss

        if len(args) > 1:
            return (args[0], closure_then_observe, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_observe}


def outside_graphs(hook: Callable[..., Any]) -> Any:
    """Return a hook that stays out of compiled graphs, which would silently lose what it does."""
    return torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
