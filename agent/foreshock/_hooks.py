"""Where Foreshock touches autograd and the optimizer: the end of backward, and what comes before and after a step.

Each hook is a few lines that hand over to a plain object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from foreshock._guard import Guard


class BackwardEnd:
    """Calls back once a backward pass is over and DDP has put the averaged gradients in place."""

    _SAMPLES = 3

    def __init__(self, parameters: Sequence[nn.Parameter], call: Callable[[], None], guard: Guard) -> None:
        """guard: autograd lets us queue a callback by a way that it does not document."""
        self._call = call
        self._guard = guard
        self._armed = False
        last = len(parameters) - 1
        chosen = {0, last // 2, last}
        self._handles = [
            parameters[i].register_post_accumulate_grad_hook(self._arm)  # type: ignore[no-untyped-call]
            for i in sorted(chosen)
        ]

    def rearm(self) -> None:
        """A backward pass that raised never ended: be ready for the next one all the same."""
        self._armed = False

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _arm(self, _: Tensor) -> None:
        if not self._armed:
            with self._guard:
                self._armed = True
                _engine().queue_callback(self._requeue)

    def _requeue(self) -> None:
        with self._guard:
            # DDP queues its own callback after ours: go behind it once more.
            _engine().queue_callback(self._fire)

    def _fire(self) -> None:
        self._armed = False
        with self._guard:
            self._call()


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
