"""DDP's communication hook, for models whose own gradients show nowhere else: bucket views and static graphs.

DDP takes one hook for its whole life. It is ours, or the script's own in our wrapper; observers come and go.
"""

# No postponed annotations here: DDP compares those of its hook with the classes themselves.

import weakref
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from foreshock._hooks.backward import BackwardHooks, BackwardObserver
from foreshock._measure.rank_sums import RankSums
from foreshock._torch import GradBucket, comm_hooks, has_comm_hook, hide_comm_hook

CommHook = Callable[[Any, GradBucket], Future[Tensor]]


def local_norms_wrapper(hook: CommHook) -> CommHook:
    """Wrap a communication hook of your own, so that Foreshock can measure each rank's gradients before it.

        model.register_comm_hook(state, foreshock.local_norms_wrapper(fp16_compress_hook))
        watch = foreshock.attach(model, optimizer)

    Needed only with `gradient_as_bucket_view=True` or `static_graph=True`. It does what `hook` does, with and without a
    watch. Local norms are from before `hook` has compressed anything, global norms from its result. Wrap once for each
    model.
    """
    return _Wrapped(hook)


class _Wrapped:
    """Goes wherever the hook goes: DDP models are copied and saved with theirs."""

    def __init__(self, hook: CommHook) -> None:
        update_wrapper(self, hook)
        self.hook = hook
        self.observer: BackwardHooks | None = None

    def __call__(self, state: Any, bucket: GradBucket) -> Future[Tensor]:
        """Measure, then reduce."""
        if self.observer is not None:
            self.observer.bucket(bucket)
        return self.hook(state, bucket)

    def __reduce__(self) -> tuple[Any, ...]:
        return local_norms_wrapper, (self.hook,)


class HookState:
    """Keeps the state of our own hook."""

    def __init__(self, model: DistributedDataParallel, observer: BackwardHooks) -> None:
        self.group: dist.ProcessGroup = model.process_group
        self.ranks = dist.get_world_size(self.group)
        self.observer = observer
        self.works: list[dist.Work] = []
        """Reductions of the newest backward pass. gloo's thread must not hold the last reference to one: releasing it
        needs the interpreter, and an interpreter that is about to end aborts the process."""
        self._addresses: dict[int, int] = {}
        """Address of each parameter's gradient, by the parameter's identity, before this backward pass."""
        if model.gradient_as_bucket_view and self.ranks & (self.ranks - 1):
            for parameter in model.module.parameters():
                if parameter.requires_grad:
                    # Hooks of a tensor go neither into its copies nor into files, as a module's would.
                    parameter.register_hook(partial(self._arrives, weakref.ref(parameter)))

    def average(self, bucket: GradBucket) -> Tensor:
        """Return the bucket's buffer, divided by the number of ranks as DDP itself would: bit for bit.

        DDP multiplies by 1/W while it copies a gradient into the bucket, and divides by W where the gradient lies in
        the bucket already (`gradient_as_bucket_view`, with gradients that were zeroed and not dropped). For a power of
        two both are the same.
        """
        buffer = bucket.buffer()
        if self._addresses:
            start = buffer.data_ptr()
            if start <= self._addresses.get(id(bucket.parameters()[0]), -1) < start + buffer.nbytes:
                return buffer.div_(self.ranks)
        return buffer.mul_(1.0 / self.ranks)

    def _arrives(self, reference: weakref.ref[nn.Parameter], _: Tensor) -> None:
        # Called before it is accumulated: afterwards all lie in their buckets.
        if (parameter := reference()) is not None:
            self._addresses[id(parameter)] = -1 if parameter.grad is None else parameter.grad.data_ptr()


def measure_then_allreduce_hook(state: HookState, bucket: GradBucket) -> Future[Tensor]:
    """Measure the bucket, then average it as DDP itself would.

    A hook turns off DDP's own division: `average` does it, before the sum, which would overflow in half precision.
    """
    if bucket.index() == 0:
        state.works.clear()
    state.observer.bucket(bucket)
    work = dist.all_reduce(state.average(bucket), group=state.group, async_op=True)
    state.works.append(work)
    future: Future[Tensor] = work.get_future().then(_reduced)
    return future


def _reduced(future: Future[list[Tensor]]) -> Tensor:
    # The bucket's own buffer: another tensor would be copied back.
    return future.value()[0]


def keep_alone_hook(model: weakref.ref[DistributedDataParallel], bucket: GradBucket) -> Future[Tensor]:
    """Return a single rank's gradients as they are: they are the averages.

    Without it, DDP multiplies them by one and waits for a sum over one rank: 3 % of a step of 1 M parameters on a CPU.
    """
    ddp = model()
    assert ddp is not None
    if ddp.process_group.size() == 1:
        return noop_hook(None, bucket)
    # An elastic job has given the model another group.
    return default_hooks.allreduce_hook(ddp.process_group, bucket)


def _keep_alone(model: nn.Module) -> None:
    """Register `keep_alone_hook`, unless the script has a hook. DDP asks for them before the first backward pass."""
    assert isinstance(model, DistributedDataParallel)
    if not has_comm_hook(model):
        model.register_comm_hook(weakref.ref(model), keep_alone_hook)
        hide_comm_hook(model)


_hooked: WeakKeyDictionary[nn.Module, BackwardHooks] = WeakKeyDictionary()
_ours: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models whose communication hook is our own."""


def needs_comm_hook(model: DistributedDataParallel) -> bool:
    """Return whether this rank's own gradients show only in a communication hook."""
    return bool(model.gradient_as_bucket_view or model.static_graph)


def comm_hook_taken(model: DistributedDataParallel) -> bool:
    """Return whether the script has registered a communication hook of its own, without our wrapper.

    A single rank needs none, whatever the model.
    """
    if model in _ours or model.process_group.size() == 1:
        return False
    return _wrapped(model) is None and has_comm_hook(model)


def observe_backward(
    model: nn.Module, observer: BackwardObserver, sums: RankSums | None, *, by_bucket: bool
) -> BackwardHooks:
    """Let an observer follow the model's backward passes. by_bucket: through DDP's communication hook as well."""
    hooks = _hooked.get(model)
    if hooks is None:
        alone = isinstance(model, DistributedDataParallel) and _trains_alone(model)
        hooks = _hooked[model] = BackwardHooks(model, after_first_pass=_keep_alone if alone else None)
    if by_bucket and isinstance(model, DistributedDataParallel) and model not in _ours:
        wrapped = _wrapped(model)
        if wrapped is None:
            model.register_comm_hook(HookState(model, hooks), measure_then_allreduce_hook)
            hide_comm_hook(model)
            _ours.add(model)
        else:
            wrapped.observer = hooks
    hooks.place(observer, sums, by_bucket=by_bucket)
    return hooks


def _trains_alone(model: DistributedDataParallel) -> bool:
    """Return whether one rank trains, on a CPU: on a GPU, a sum over one rank hardly costs anything."""
    return model.process_group.size() == 1 and model.device_type == "cpu"


def _wrapped(model: DistributedDataParallel) -> _Wrapped | None:
    return next((hook for hook in comm_hooks(model) if isinstance(hook, _Wrapped)), None)
