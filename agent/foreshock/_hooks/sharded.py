"""Backward passes of a model that `fully_shard` has sharded.

It puts reduced gradients in place layer by layer, on streams of its own, and makes all of them ready in a callback at
the end of backward. A callback that is requested when a gradient arrives comes after that one.
"""

from __future__ import annotations

import weakref
from functools import partial
from operator import attrgetter
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foreshock._hooks.backward import BackwardObserver, outside_graphs
from foreshock._measure.shards import ShardSums
from foreshock._torch import after_backward, backward_finished, graph_task_id


class ShardedHooks:
    """Follows the backward passes of one model, and sums up after each that reduces gradients.

    One per model, for the model's life: other ranks need the shards of a rank whose watch has left.
    """

    def __init__(self, model: nn.Module, sums: ShardSums) -> None:
        self._model = weakref.ref(model)
        self._observer: weakref.ref[BackwardObserver] | None = None
        self.sums = sums
        self._tasks: set[int] = set()
        """Autograd's numbers of the tasks of this pass that a gradient has arrived in: several under reentrant
        checkpointing. One that raised never ends."""
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(outside_graphs(self._forward))]
        # Garbage collection does not see what these hooks hold: if that led to the parameters, none would be freed.
        arrived = partial(self._arrived, weakref.ref(self))
        for parameter in filter(attrgetter("requires_grad"), sums.parameters):
            self._handles.append(parameter.register_post_accumulate_grad_hook(arrived))  # type: ignore[no-untyped-call]

    def place(self, observer: BackwardObserver) -> None:
        """Start calling an observer. Every rank sums up once: the next step may come before any backward pass."""
        self._observer = weakref.ref(observer)
        self.sums.measure()
        self.sums.issue()

    def leave(self) -> None:
        """Stop calling the observer."""
        self._observer = None

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def _forward(self, *_: object) -> None:
        observer = None if self._observer is None else self._observer()
        # The first all-gather already waits for the others.
        if observer is not None and torch.is_grad_enabled():
            observer.backward_computed()

    @staticmethod
    def _arrived(hooks: weakref.ref[ShardedHooks], parameter: Tensor) -> None:
        self, task = hooks(), graph_task_id()
        if self is None or task in self._tasks:
            return
        observer = None if self._observer is None else self._observer()
        began = not self._tasks
        self._tasks.add(task)
        if observer is not None and began:
            observer.backward_began(parameter)
        try:
            after_backward(partial(self._ended, task))
        except Exception as error:
            self._count(error)

    def _ended(self, task: int) -> None:
        model = self._model()
        if model is None or task not in self._tasks:
            return
        try:
            finished = backward_finished(model)
        except Exception as error:
            # As on the other ranks, nearly always.
            finished = True
            self._count(error)
        if not finished:
            return
        self._tasks = set()
        observer = None if self._observer is None else self._observer()
        if observer is not None:
            observer.prepare_sum()
        try:
            self.sums.measure()
        except Exception as error:
            self._count(error)
            self.sums.measure_fallback()
        try:
            self.sums.issue()
        except Exception as error:
            self._count(error)
        if observer is not None:
            observer.backward_ended(averaged=True, sums=False)

    def _count(self, error: Exception) -> None:
        observer = None if self._observer is None else self._observer()
        if observer is not None:
            observer.guard.count(error)


_hooked: WeakKeyDictionary[nn.Module, ShardedHooks] = WeakKeyDictionary()


def observe_shards(model: nn.Module, observer: BackwardObserver, sums: ShardSums) -> ShardedHooks:
    """Let an observer follow the model's backward passes, with these sums from now on. Called by all ranks together."""
    if model in _hooked:
        _hooked[model].remove()
    hooks = _hooked[model] = ShardedHooks(model, sums)
    hooks.place(observer)
    return hooks
