"""Where Foreshock touches autograd and the optimizer: the end of backward, and what comes before and after a step.

Each hook is a few lines that hand over to a plain object.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from foreshock._guard import Guard

_NO_TASK = -1


class BackwardWatcher(Protocol):
    """Who follows the backward passes."""

    def backward_began(self, first: Tensor) -> None:
        """`first` is the first of the parameters looked at that has its gradient; the others have theirs of before."""

    def backward_computed(self) -> None:
        """This rank's own gradients are computed; the averaging may still wait for other ranks."""

    def backward_ended(self) -> None:
        """DDP has put the averaged gradients in place."""


class BackwardEnd:
    """Tells of the backward passes that reach these parameters. Holds its watcher weakly: parameters hold the hooks."""

    def __init__(self, watcher: BackwardWatcher, guard: Guard) -> None:
        """guard: autograd lets us queue a callback by a way that it does not document."""
        self._watcher = weakref.ref(watcher)
        self._guard = guard
        self._task = _NO_TASK
        """Which pass it is, as autograd numbers them: one that raised has never ended."""
        self._handles: list[RemovableHandle] = []

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """These, from now on."""
        self.remove()
        last = len(parameters) - 1
        # A few tell of all: a hook on each would cost more than the rest.
        self._handles = [
            parameters[i].register_post_accumulate_grad_hook(self._arm)  # type: ignore[no-untyped-call]
            for i in sorted({0, last // 2, last})
            if parameters[i].requires_grad
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _arm(self, parameter: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        watcher = self._watcher()
        if task == self._task or watcher is None:
            return
        self._task = task
        with self._guard:
            _engine().queue_callback(self._computed)
        with self._guard:
            watcher.backward_began(parameter)

    def _computed(self) -> None:
        if (watcher := self._watcher()) is None:
            return
        with self._guard:
            watcher.backward_computed()
        with self._guard:
            # DDP queues its own callback after ours, and waits there: go behind it once more.
            _engine().queue_callback(self._ended)

    def _ended(self) -> None:
        self._task = _NO_TASK
        if (watcher := self._watcher()) is not None:
            with self._guard:
                watcher.backward_ended()


def _engine() -> Any:
    return Variable._execution_engine


class StepWatcher(Protocol):
    """Who acts around the optimizer's step."""

    def before_step(self) -> None:
        """The gradients are final."""

    def after_step(self) -> None:
        """The optimizer has stepped."""


class StepHooks:
    """The optimizer's pre- and post-hook.

    Both stay out of graphs: a compiled `optimizer.step` would otherwise lose the clip without a word.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, watcher: StepWatcher) -> None:
        self._optimizer = optimizer
        self._watcher = watcher
        self._before = optimizer.register_step_pre_hook(_outside_graphs(self._pre))
        self._after = optimizer.register_step_post_hook(_outside_graphs(self._post))

    def is_last(self) -> bool:
        """No pre-hook runs after ours: one that edits gradients would undo the clip."""
        return bool(next(reversed(self._optimizer._optimizer_step_pre_hooks)) == self._before.id)

    def remove(self) -> None:
        """Take both away."""
        self._before.remove()
        self._after.remove()

    def _pre(self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._watcher.before_step()
            return None

        def closure_then_watch() -> Any:
            # The gradients of step(closure) do not exist before the closure has run.
            loss = closure()
            self._watcher.before_step()
            return loss

        if len(args) > 1:
            return (args[0], closure_then_watch, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_watch}

    def _post(self, *_: Any) -> None:
        self._watcher.after_step()


def _outside_graphs(hook: Any) -> Any:
    return torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
