"""DDP's communication hook: a rank's own gradients, bucket by bucket, before they are reduced.

DDP takes one hook for its whole life. It is ours, or the script's own in our wrapper; watchers come and go.
"""

# No postponed annotations here: DDP compares those of its hook with the classes themselves.

import weakref
from collections.abc import Callable, Sequence
from functools import partial, update_wrapper
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from foreshock._local import RankSums

CommHook = Callable[[Any, GradBucket], Future[Tensor]]


class BucketWatcher(Protocol):
    """Who looks at a rank's gradients before they are reduced."""

    def bucket(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, first: bool) -> None:
        """One bucket is about to be reduced, the first of its backward pass or a later one."""

    def last_bucket(self) -> None:
        """All buckets of this backward pass have been seen; their last one is not reduced yet."""


class Lookout:
    """The place in a model's communication hook where a watcher stands, if one does."""

    def __init__(self) -> None:
        # DDP keeps its hook where Python's garbage collector does not look: held strongly, no watcher would ever go.
        self._watcher: weakref.ref[BucketWatcher] | None = None
        self._sums: RankSums | None = None

    def place(self, watcher: BucketWatcher, sums: RankSums | None) -> None:
        """sums: start with each backward pass, on every rank alike, for as long as the model lives."""
        self._watcher, self._sums = weakref.ref(watcher), sums

    def show(self, bucket: GradBucket) -> None:
        """Before the bucket is reduced."""
        watcher = None if self._watcher is None else self._watcher()
        if watcher is not None:
            watcher.bucket(bucket.parameters(), bucket.gradients(), first=bucket.index() == 0)
        if bucket.is_last():
            # Before this bucket's own reduction: issued after it, half the sums are still under way a step later.
            if watcher is not None:
                watcher.last_bucket()
            if self._sums is not None:
                self._sums.issue()


def local_norms_wrapper(hook: CommHook) -> CommHook:
    """A communication hook of your own, through which Foreshock sees each rank's gradients.

        model.register_comm_hook(state, foreshock.local_norms_wrapper(fp16_compress_hook))
        watch = foreshock.attach(model, optimizer)

    What it does is what `hook` does, with and without a watch. Local norms are those before `hook` has compressed
    anything, global ones those after it has reduced and decompressed. Wrap once for each model.
    """
    return _Wrapped(hook)


class _Wrapped:
    """Goes wherever the hook goes: DDP models are copied and saved with theirs."""

    def __init__(self, hook: CommHook) -> None:
        update_wrapper(self, hook)
        self.hook = hook
        self.lookout = Lookout()

    def __call__(self, state: Any, bucket: GradBucket) -> Future[Tensor]:
        """Look, then reduce."""
        self.lookout.show(bucket)
        return self.hook(state, bucket)

    def __reduce__(self) -> tuple[Any, ...]:
        return local_norms_wrapper, (self.hook,)


class Averaging:
    """State of our own hook."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self.group: dist.ProcessGroup = model.process_group
        self.ranks = dist.get_world_size(self.group)
        self.lookout = Lookout()
        self.works: list[dist.Work] = []
        """Reductions of the newest backward pass. gloo's thread must not hold the last reference to one: that needs the
        interpreter, and one that is about to end aborts the process."""
        self._places: dict[int, int] = {}
        """Where the gradient of each parameter, by its identity, lay before this backward pass."""
        if model.gradient_as_bucket_view and self.ranks & (self.ranks - 1):
            for parameter in model.module.parameters():
                if parameter.requires_grad:
                    # Hooks of a tensor go neither into its copies nor into files, as a module's would.
                    parameter.register_hook(partial(self._arrives, weakref.ref(parameter)))

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
            if start <= self._places.get(id(bucket.parameters()[0]), -1) < start + buffer.nbytes:
                return buffer.div_(self.ranks)
        return buffer.mul_(1.0 / self.ranks)

    def _arrives(self, reference: weakref.ref[nn.Parameter], _: Tensor) -> None:
        # Called before it is accumulated: afterwards all lie in their buckets.
        if (parameter := reference()) is not None:
            self._places[id(parameter)] = -1 if parameter.grad is None else parameter.grad.data_ptr()


def look_then_average(state: Averaging, bucket: GradBucket) -> Future[Tensor]:
    """DDP's communication hook: look, then average as DDP itself would.

    A hook turns off DDP's own division: `average` does it, before the sum, which would overflow in half precision.
    """
    if bucket.index() == 0:
        state.works.clear()
    state.lookout.show(bucket)
    work = dist.all_reduce(state.average(bucket), group=state.group, async_op=True)
    state.works.append(work)
    future: Future[Tensor] = work.get_future().then(_reduced)
    return future


def _reduced(future: Future[list[Tensor]]) -> Tensor:
    # The bucket's own buffer: another tensor would be copied back.
    return future.value()[0]


_lookouts: WeakKeyDictionary[nn.Module, Lookout] = WeakKeyDictionary()


def hook_taken(model: DistributedDataParallel) -> bool:
    """The script has put a communication hook of its own, without our wrapper, into the only place there is."""
    if _lookout(model) is not None:
        return False
    # DDP lists hooks in Python; one of its built-in hooks leaves a trace in its logging data alone.
    logged = model._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    return bool(model._comm_hooks or logged.get("comm_hook"))


def watch_buckets(model: DistributedDataParallel, watcher: BucketWatcher, sums: RankSums | None) -> None:
    """Put a watcher into the model's communication hook; register ours where there is none."""
    lookout = _lookout(model)
    if lookout is None:
        averaging = Averaging(model)
        model.register_comm_hook(averaging, look_then_average)
        # DDP's list is what a copy or a file of the model takes along, and it has a process group in it. Its reducer,
        # which calls the hook, does not look there.
        model._comm_hooks.pop()
        lookout = averaging.lookout
    _lookouts[model] = lookout
    lookout.place(watcher, sums)


def _lookout(model: DistributedDataParallel) -> Lookout | None:
    if model in _lookouts:
        return _lookouts[model]
    return next((hook.lookout for hook, _ in model._comm_hooks if isinstance(hook, _Wrapped)), None)
