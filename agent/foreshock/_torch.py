"""Every private name of torch that the probe uses, each behind a public one, with the reason.

No public name does what these do. tests/agent/test_torch.py has a test on each, so that a version of torch that changes
one is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket as GradBucket
from torch._C._distributed_c10d import PrefixStore as PrefixStore
from torch._C._distributed_c10d import Store as Store
from torch.autograd import Variable
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel

# GradBucket, PrefixStore and Store: torch.distributed has them too, but type checkers do not see them there.

foreach_norm = torch._foreach_norm
"""Return the norm of each of many tensors. A launch for each tensor would cost more than the norms themselves."""
foreach_multiply_ = torch._foreach_mul_
foreach_clamp_min_ = torch._foreach_clamp_min_
foreach_clamp_max_ = torch._foreach_clamp_max_
version_of: Callable[[Tensor], int] = attrgetter("_version")
"""Return how often a tensor has been changed in place: shows that values have changed without reading one."""
after_backward: Callable[[Callable[[], None]], None] = Variable._execution_engine.queue_callback
"""Request a call at the end of the backward pass that runs in this thread. Calls come in the order of requests; DDP
requests its own, in which it waits for its averages, when the last gradient arrives."""
in_join: Callable[[DistributedDataParallel], bool] = attrgetter("_join_config.enable")
"""Return whether the model is used within `join`, where ranks may run out of inputs; stays true after it."""
shard_of: Callable[[Tensor], Tensor] = attrgetter("_local_tensor")
"""Return this rank's shard of a DTensor. `to_local` goes through autograd, and takes ten times as long."""
graph_task_id = torch._C._current_graph_task_id
"""Return the number of the backward pass that runs in this thread, -1 outside of one. One that raised never ends."""
step_pre_hooks: Callable[[torch.optim.Optimizer], Mapping[int, object]] = attrgetter("_optimizer_step_pre_hooks")
"""Return the step pre-hooks by their handles' ids, in the order in which they run. The mapping follows changes."""


def supports_division(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a fused optimizer of this type divides by its attribute `grad_scale`, as `GradScaler` asks."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def scale_of(scaler: torch.amp.GradScaler) -> Tensor | None:
    """Return the scale on its device, None if the scaler is disabled or new. `get_scale` waits for the device."""
    return getattr(scaler, "_scale", None)


def has_comm_hook(model: DistributedDataParallel) -> bool:
    """Return whether a communication hook is registered, one of DDP's built-in hooks included."""
    # A built-in hook shows only in the logging data.
    logged = model._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    return bool(model._comm_hooks or logged.get("comm_hook"))


def comm_hooks(model: DistributedDataParallel) -> list[Callable[..., Any]]:
    """Return the hooks that were registered by `register_comm_hook`."""
    return [hook for hook, _ in model._comm_hooks]


def hide_comm_hook(model: DistributedDataParallel) -> None:
    """Take the newest hook out of the list that a copy or a file of the model contains. It keeps running.

    Its state has a process group, which can be neither copied nor saved.
    """
    model._comm_hooks.pop()


def has_rebuilt_buckets(model: DistributedDataParallel) -> bool:
    """Return whether buckets are in the order in which gradients arrive; until then, in the model's."""
    return bool(getattr(model, "_has_rebuilt_buckets", True))


def original_type(module: nn.Module) -> type[nn.Module]:
    """Return a module's own class: `fully_shard` replaces it by a subclass."""
    kind = type(module)
    own: type[nn.Module] = kind.__mro__[getattr(kind, "_orig_cls_mro_index", 0)]
    return own


def backward_finished(model: nn.Module) -> bool:
    """Return whether `fully_shard` has put the reduced gradients of a backward pass in place, on the current stream.

    False in a callback that comes earlier, and in a pass that is not the last by the script's `set_is_last_backward`.
    """
    context: Any = model._get_fsdp_state()._state_ctx  # type: ignore[operator]
    return bool(context.is_last_backward and not context.post_backward_final_callback_queued)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wraps."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def default_store() -> Store:
    """Return the store of the job's default process group: there, ranks agree before anything is hooked."""
    store: Store = _get_default_store()
    return store
