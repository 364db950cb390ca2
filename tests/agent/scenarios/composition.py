"""Scenarios of test_composition.py: what DDP scripts do, beside stock clipping of the same. Each rank runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import foreshock
from foreshock._torch import has_comm_hook
from tests.agent.scenarios.training import (
    STEPS,
    WIDTH,
    active,
    alike,
    apart,
    batches,
    error_of,
    loss_of,
    main,
    make_model,
    make_optimizer,
    same,
    told,
    weights,
)

MAX_NORM = 0.5
Make = Callable[[], tuple[nn.Module, torch.optim.Optimizer]]


def column(found: dict[str, Any], name: str) -> list[Any]:
    return [record["measured"][name] for record in found["records"]]


def beside_stock(make: Make, *, attach: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    """Stock clipping and ours, on the same data."""
    model, optimizer = make()
    norms: list[float] = []
    stock = train(model, optimizer, lambda: norms.append(float(clip(averaged(model)))), **training)
    model, optimizer = make()
    with foreshock.attach(model, optimizer, clip=MAX_NORM, **(attach or {})) as watch:
        ours = train(model, optimizer, lambda: None, **training)
        local = active(watch)._measure.local is not None
        inner: Any = getattr(model, "_orig_mod", model)
        hooked = has_comm_hook(inner)
        found = told(watch)
    return {
        "apart": apart(stock, ours),
        "hooked": hooked,
        "sums": column(found, "reduced_sequence"),
        "alike": alike(
            [w for w, p in zip(ours, model.parameters(), strict=True) if any(p is a for a in averaged(model))]
        ),
        "norms": norms,
        "global": column(found, "global_norm"),
        "local": column(found, "local_norm"),
        "measures local": local,
        "dropped": found["dropped"],
    }


def averaged(model: nn.Module) -> list[nn.Parameter]:
    """What DDP averages."""
    inner: Any = getattr(model, "_orig_mod", model)
    return [p for name, p in inner.module.named_parameters() if name not in inner.parameters_to_ignore]


def clip(parameters: list[nn.Parameter]) -> Tensor:
    return nn.utils.clip_grad_norm_(parameters, MAX_NORM)


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    before_step: Callable[[], Any],
    *,
    others: Any = (),
    joined: Any = None,
) -> list[Tensor]:
    data = batches()
    steps = STEPS if joined is None else STEPS + 2 * dist.get_rank()
    with joined(model) if joined else torch.enable_grad():
        for _ in range(steps):
            model.zero_grad()
            loss_of(model, data).backward()  # type: ignore[no-untyped-call]
            before_step()
            optimizer.step()
            for other in others:
                other.step()
    return weights(model)


def hooked(register: Callable[[DistributedDataParallel], Any], **ddp: Any) -> Make:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = make_model(**ddp)
        register(model)
        return model, make_optimizer(model, fused=True)

    return make


def later_step_hook() -> dict[str, Any]:
    """It runs after ours: what it does comes on top of the clipping."""

    def double(model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = 2 * parameter.grad

    norms: list[float] = []

    def clip_and_double(model: nn.Module) -> None:
        norms.append(float(clip(averaged(model))))
        double(model)

    model = make_model()
    stock = train(model, make_optimizer(model, fused=True), lambda: clip_and_double(model))
    model = make_model()
    optimizer = make_optimizer(model, fused=True)
    with foreshock.attach(model, optimizer, clip=MAX_NORM) as watch:
        optimizer.register_step_pre_hook(lambda *_: double(model))
        ours = train(model, optimizer, lambda: None)
        found = told(watch)
    return {"apart": apart(stock, ours), "norms": norms, "global": column(found, "global_norm")}


def fp16_compression() -> dict[str, Any]:
    return _with_hook(default_hooks.fp16_compress_hook)


def bf16_compression() -> dict[str, Any]:
    return _with_hook(bf16_by_another_name)


def power_sgd() -> dict[str, Any]:
    return beside_stock(in_one_bucket(powerSGD_hook)) | before_reduction()


def hook_of_their_own() -> dict[str, Any]:
    return _with_hook(half)


def _with_hook(hook: Any, **ddp: Any) -> dict[str, Any]:
    return beside_stock(hooked(lambda model: model.register_comm_hook(None, hook), **ddp)) | before_reduction()


def fp16_compression_in_views() -> dict[str, Any]:
    return _with_hook(default_hooks.fp16_compress_hook, gradient_as_bucket_view=True)


def bf16_compression_in_views() -> dict[str, Any]:
    return _with_hook(bf16_by_another_name, gradient_as_bucket_view=True)


def power_sgd_in_views() -> dict[str, Any]:
    return beside_stock(in_one_bucket(powerSGD_hook, gradient_as_bucket_view=True)) | before_reduction()


def hook_of_their_own_in_views() -> dict[str, Any]:
    return _with_hook(half, gradient_as_bucket_view=True)


def fp16_compression_wrapped() -> dict[str, Any]:
    return _wrapped(default_hooks.fp16_compress_hook)


def bf16_compression_wrapped() -> dict[str, Any]:
    return _wrapped(bf16_by_another_name)


def power_sgd_wrapped() -> dict[str, Any]:
    hook = foreshock.local_norms_wrapper(powerSGD_hook)
    return beside_stock(in_one_bucket(hook, gradient_as_bucket_view=True)) | before_reduction()


def hook_of_their_own_wrapped() -> dict[str, Any]:
    return _wrapped(half)


def _wrapped(hook: Any) -> dict[str, Any]:
    return _with_hook(foreshock.local_norms_wrapper(hook), gradient_as_bucket_view=True)


def fp16_compression_wrapped_in_vain() -> dict[str, Any]:
    """Without views and static graphs the wrapper is not needed, and does no harm."""
    return _with_hook(foreshock.local_norms_wrapper(default_hooks.fp16_compress_hook))


def before_reduction() -> dict[str, Any]:
    """This rank's own gradient at the first step, by a model that is none of DDP's."""
    alone = make_model().module
    loss_of(alone, batches()).backward()  # type: ignore[no-untyped-call]
    squares = [p.grad.double().square().sum() for p in alone.parameters() if p.grad is not None]
    return {"own norm": float(torch.stack(squares).sum().sqrt())}


def bf16_by_another_name(group: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Torch registers the original with NCCL alone."""
    return default_hooks.bf16_compress_hook(group, bucket)


def half(group: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """An average, and then half of it."""
    reduced = default_hooks.allreduce_hook(group, bucket)
    return reduced.then(lambda future: future.value() / 2)


# DDP compares annotations with the classes themselves; those of this module are postponed.
bf16_by_another_name.__annotations__.clear()
half.__annotations__.clear()


def in_one_bucket(hook: Any, **ddp: Any) -> Make:
    """PowerSGD with more of them deadlocks on gloo, in trainings without Foreshock too (torch 2.13)."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = DistributedDataParallel(make_model().module, **ddp)
        state = PowerSGDState(process_group=None, matrix_approximation_rank=2, start_powerSGD_iter=2)
        model.register_comm_hook(state, hook)
        return model, make_optimizer(model, fused=True)

    return make


def plain() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model()
    return model, make_optimizer(model, fused=True)


def uneven_inputs() -> dict[str, Any]:
    return beside_stock(plain, joined=lambda model: model.join())


def uneven_inputs_divided_by_those_left() -> dict[str, Any]:
    joined = lambda model: model.join(divide_by_initial_world_size=False)  # noqa: E731
    return beside_stock(plain, joined=joined)


def uneven_inputs_in_views() -> dict[str, Any]:
    return beside_stock(hooked(lambda _: None, gradient_as_bucket_view=True), joined=lambda model: model.join())


def uneven_inputs_divided_by_those_left_in_views() -> dict[str, Any]:
    joined = lambda model: model.join(divide_by_initial_world_size=False)  # noqa: E731
    make = hooked(lambda _: None, gradient_as_bucket_view=True)
    return beside_stock(make, joined=joined, attach={"local_norms": False})


def static_graph() -> dict[str, Any]:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model(static_graph=True)
        return model, make_optimizer(model, fused=True)

    return beside_stock(make)


def compiled() -> dict[str, Any]:
    """The DDP module compiled, and the optimizer's step too."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model: Any = torch.compile(DistributedDataParallel(make_model().module), backend="aot_eager")
        return model, make_optimizer(model, fused=True)

    return beside_stock(make)


def compiled_step() -> dict[str, Any]:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model()
        optimizer = make_optimizer(model)
        optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign, assignment]
        return model, optimizer

    return beside_stock(make)


class Ignoring(nn.Module):
    """A part that DDP leaves alone: each rank has its own gradient of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.own = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)
        self._ddp_params_and_buffers_to_ignore = ["own.weight", "own.bias"]

    def forward(self, x: Tensor) -> Any:
        return self.shared(x) + self.own(x)


def ignored_fused() -> dict[str, Any]:
    return _ignored(fused=True)


def ignored_unfused() -> dict[str, Any]:
    return _ignored(fused=False)


def _ignored(*, fused: bool) -> dict[str, Any]:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = DistributedDataParallel(Ignoring())
        return model, make_optimizer(model, fused=fused)

    return beside_stock(make)


def frozen_and_shared() -> dict[str, Any]:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1))
        inner[2].weight = inner[0].weight
        inner[3].bias.requires_grad_(False)
        model = DistributedDataParallel(inner)
        return model, make_optimizer(model, fused=True)

    return beside_stock(make)


def several_optimizers() -> dict[str, Any]:
    """One is watched: its parameters are clipped, by their norm alone; the other's are left alone."""

    def run(*, watched: bool) -> tuple[list[Tensor], list[float], str | None]:
        model = make_model()
        body, head = list(model.module[:4].parameters()), list(model.module[4].parameters())
        optimizer, other = torch.optim.AdamW(body, lr=0.01, fused=True), torch.optim.SGD(head, lr=0.01)
        if not watched:
            return train(model, optimizer, lambda: clip(body), others=[other]), [], None
        with foreshock.attach(model, optimizer, clip=MAX_NORM) as watch:
            second = error_of(lambda: foreshock.attach(model, other))
            return train(model, optimizer, lambda: None, others=[other]), column(told(watch), "local_norm"), second

    stock, _, _ = run(watched=False)
    ours, local, second = run(watched=True)
    return {"apart": apart(stock, ours), "alike": alike(ours), "local": local, "second": second}


def detached_and_attached_again() -> dict[str, Any]:
    model, optimizer = plain()
    stock = train(model, optimizer, lambda: clip(averaged(model)))
    model, optimizer = plain()
    data, counts = batches(), []
    for steps in (2, STEPS - 2):
        with foreshock.attach(model, optimizer, clip=MAX_NORM) as watch:
            for _ in range(steps):
                model.zero_grad()
                loss_of(model, data).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            counts.append(len(told(watch)["records"]))
    return {"apart": apart(stock, weights(model)), "counts": counts}


def detached() -> dict[str, Any]:
    """DDP's hook stays and averages as DDP would: training goes on as if nobody had ever attached."""
    model, optimizer = plain()
    stock = train(model, optimizer, lambda: None)
    model, optimizer = plain()
    foreshock.attach(model, optimizer, clip=MAX_NORM).detach()
    return {"as stock": same(stock, train(model, optimizer, lambda: None))}


def refusals() -> dict[str, Any]:
    model, optimizer = plain()
    second, _ = plain()
    both = torch.optim.SGD([*model.parameters(), *second.parameters()], lr=0.1)
    complex_model = DistributedDataParallel(nn.Linear(2, 2, dtype=torch.complex64))
    sparse = DistributedDataParallel(nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 1)))
    sharded = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.SGD, lr=0.1)

    def refused(a: nn.Module, b: torch.optim.Optimizer) -> str | None:
        return error_of(lambda: foreshock.attach(a, b))

    return {
        "fsdp": refused(sharded, optimizer),
        "zero": refused(model, zero),
        "sparse": refused(sparse, torch.optim.SGD(sparse.parameters(), lr=0.1)),
        "complex": refused(complex_model, torch.optim.SGD(complex_model.parameters(), lr=0.1)),
        "two models": refused(model, both),
        "hooks": len(model._comm_hooks) + len(optimizer._optimizer_step_pre_hooks),  # type: ignore[arg-type]
    }


if __name__ == "__main__":
    main({name: value for name, value in vars(sys.modules[__name__]).items() if callable(value)})
