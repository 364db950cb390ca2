"""Where Foreshock touches torch: DDP's communication hook, the end of backward, the optimizer's step.

Each hook is a few lines that hand over to a plain object.
"""

# No postponed annotations here: DDP compares those of its hook with the classes themselves.

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.autograd import Variable
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel


class BucketWatcher(Protocol):
    """Who looks at a rank's gradients before they are reduced."""

    def bucket(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, first: bool) -> None:
        """One bucket is about to be reduced, the first of its backward pass or a later one."""

    def last_bucket(self) -> None:
        """All buckets of this backward pass have been seen; their last one is not reduced yet."""


class BucketHook:
    """State of the communication hook. DDP takes one hook for its whole life, so the watcher comes and goes here."""

    def __init__(self, model: DistributedDataParallel, watcher: BucketWatcher) -> None:
        self.group: dist.ProcessGroup = model.process_group
        self.ranks = dist.get_world_size(self.group)
        self.watcher = watcher
        self.works: list[dist.Work] = []
        """Reductions of the newest backward pass. gloo's thread must not be the last to let go of one: that needs the
        interpreter, and one that is about to end aborts the process."""
        self._places: dict[Tensor, int] = {}
        if model.gradient_as_bucket_view and self.ranks & (self.ranks - 1):
            # The wrapped module's forward: by then DDP has rebuilt its buckets, if it is going to.
            model.module.register_forward_pre_hook(self._before_forward)

    def average(self, bucket: GradBucket) -> Tensor:
        """The bucket's buffer, divided by the number of ranks as DDP itself would: bit for bit.

        DDP multiplies by 1/W while it copies a gradient into the bucket, and divides by W where the gradient lies in
        the bucket already (`gradient_as_bucket_view`, with gradients that were zeroed and not dropped). For a power of
        two both are the same.
        """
        buffer = bucket.buffer()
        if self.ranks == 1:
            # DDP divides by one here: a pass over the gradients for nothing.
            return buffer
        if self._places:
            start = buffer.data_ptr()
            if start <= self._places.get(bucket.parameters()[0], -1) < start + buffer.nbytes:
                return buffer.div_(self.ranks)
        return buffer.mul_(1.0 / self.ranks)

    def _before_forward(self, module: nn.Module, _: Any) -> None:
        # Where gradients lie before backward: afterwards all lie in their buckets.
        self._places = {p: p.grad.data_ptr() for p in module.parameters() if p.grad is not None}


def before_reduction(state: BucketHook, bucket: GradBucket) -> Future[Tensor]:
    """DDP's communication hook: look, then average as DDP itself would.

    A hook turns off DDP's own division: `average` does it, before the sum, which would overflow in half precision.
    """
    first = bucket.index() == 0
    if first:
        state.works.clear()
    state.watcher.bucket(bucket.parameters(), bucket.gradients(), first=first)
    if bucket.is_last():
        # Before this bucket's own reduction: issued after it, half the sums are still under way a step later.
        state.watcher.last_bucket()
    work = dist.all_reduce(state.average(bucket), group=state.group, async_op=True)
    state.works.append(work)
    future: Future[Tensor] = work.get_future().then(_reduced)
    return future


def _reduced(future: Future[list[Tensor]]) -> Tensor:
    # The bucket's own buffer: another tensor would be copied back.
    return future.value()[0]


_installed: WeakKeyDictionary[nn.Module, BucketHook] = WeakKeyDictionary()


def hook_taken(model: DistributedDataParallel) -> bool:
    """The script has put a communication hook of its own into the only place there is."""
    if model in _installed:
        return False
    # DDP lists hooks in Python; one of its built-in hooks leaves a trace in its logging data alone.
    logged = model._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    return bool(model._comm_hooks or logged.get("comm_hook"))


def watch_buckets(model: DistributedDataParallel, watcher: BucketWatcher) -> None:
    """Register the communication hook, or give the one from an earlier attach to this watcher."""
    if model in _installed:
        _installed[model].watcher = watcher
        return
    hook = BucketHook(model, watcher)
    model.register_comm_hook(hook, before_reduction)
    _installed[model] = hook


class BackwardEnd:
    """Calls back once a backward pass is over and DDP has put the averaged gradients in place."""

    _SAMPLES = 3

    def __init__(self, parameters: Sequence[nn.Parameter], call: Callable[[], None]) -> None:
        self._call = call
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
            self._armed = True
            _engine().queue_callback(self._requeue)

    def _requeue(self) -> None:
        # DDP queues its own callback after ours: go behind it once more.
        _engine().queue_callback(self._fire)

    def _fire(self) -> None:
        self._armed = False
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
