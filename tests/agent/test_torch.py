"""Each private name of torch still does what the probe relies on, and lies in one module."""

from __future__ import annotations

import ast
import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from foreshock import _torch
from tests.support.repository import ROOT

PROBE = ROOT / "agent/foreshock"
_groups: list[Any] = []
"""Kept: gloo's thread needs the interpreter to let go of a collective, and a group that is deleted with its model waits
for that thread without releasing the interpreter (torch 2.13)."""


@pytest.fixture
def ddp(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    _groups.append(dist.group.WORLD)
    yield DistributedDataParallel(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)))
    dist.destroy_process_group()


@pytest.fixture
def sharded(tmp_path: Path) -> Any:
    # Not above: it takes a second, in each worker that collects these tests.
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    _groups.append(dist.group.WORLD)
    yield fully_shard(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), mesh=init_device_mesh("cpu", (1,)))
    dist.destroy_process_group()


def private_names(path: Path) -> list[str]:
    """Attributes and imports that begin with an underscore and belong to something else than the object itself."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            if not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}):
                found.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found += [a.name for a in node.names if a.name.startswith("_") or "._" in (node.module or "")]
    return found


def test_private_names_of_torch_lie_in_one_module() -> None:
    allowed = {"sys": {"_getframe", "_exit"}}
    for path in sorted(PROBE.rglob("*.py")):
        if path.name != "_torch.py":
            foreign = set(private_names(path)) - allowed["sys"] - {"_stack", "_paths"}
            assert foreign == set(), path.name
    assert len(private_names(PROBE / "_torch.py")) > 10


def test_each_name_of_that_module_has_a_test() -> None:
    public = {name for name in vars(_torch) if not name.startswith("_")}
    defined = set()
    for node in ast.parse((PROBE / "_torch.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    tested = {
        node.attr
        for node in ast.walk(ast.parse(Path(__file__).read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "_torch"
    }
    assert defined & public <= tested, defined & public - tested


def test_many_tensors_take_one_call() -> None:
    tensors = [torch.full((4,), 3.0), torch.tensor([-5.0])]
    assert [float(norm) for norm in _torch.foreach_norm(tensors, 2, dtype=torch.float64)] == [6.0, 5.0]
    assert [float(norm) for norm in _torch.foreach_norm(tensors, math.inf, dtype=torch.float64)] == [3.0, 5.0]
    _torch.foreach_multiply_(tensors, 2.0)
    _torch.foreach_clamp_max_(tensors, 5.0)
    _torch.foreach_clamp_min_(tensors, -8.0)
    assert [tensor.tolist() for tensor in tensors] == [[5.0] * 4, [-8.0]]


def test_the_version_of_a_tensor_counts_changes_in_place_and_not_reads() -> None:
    tensor = torch.ones(3)
    before = _torch.version_of(tensor)
    float(tensor.sum())
    assert _torch.version_of(tensor) == before
    tensor.mul_(2)
    assert _torch.version_of(tensor) > before


def test_a_callback_comes_after_all_gradients_in_the_order_of_requests_and_may_request_another() -> None:
    first, second = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    events: list[Any] = []

    def computed() -> None:
        events.append(("computed", first.grad is not None, second.grad is not None))
        _torch.after_backward(lambda: events.append("last"))

    def arrived(_: torch.Tensor) -> None:
        events.append(_torch.graph_task_id() >= 0)
        _torch.after_backward(computed if len(events) == 1 else lambda: events.append("between"))

    for tensor in (first, second):
        tensor.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
    (first * second).sum().backward()  # type: ignore[no-untyped-call]
    assert events == [True, True, ("computed", True, True), "between", "last"]
    assert _torch.graph_task_id() == -1


def test_ddp_puts_averages_in_place_after_a_callback_that_a_first_gradient_requests(ddp: Any) -> None:
    versions = []
    weight = ddp.module[1].weight

    def note() -> None:
        versions.append(_torch.version_of(weight.grad))

    def note_twice() -> None:
        note()
        _torch.after_backward(note)

    def arrived(_: torch.Tensor) -> None:
        _torch.after_backward(note_twice)

    weight.register_post_accumulate_grad_hook(arrived)
    ddp(torch.ones(1, 3)).sum().backward()
    with ddp.no_sync():
        ddp(torch.ones(1, 3)).sum().backward()
    assert versions[1] > versions[0] and versions[3] == versions[2]


def test_step_pre_hooks_are_in_order_and_follow_changes() -> None:
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    hooks = _torch.step_pre_hooks(optimizer)
    ours = optimizer.register_step_pre_hook(lambda *_: None)
    assert list(hooks) == [ours.id]
    later = optimizer.register_step_pre_hook(lambda *_: None)
    assert list(hooks) == [ours.id, later.id]


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_a_fused_optimizer_divides_by_its_scale_and_skips_where_told(kind: str) -> None:
    def stepped(divisor: float, *, skip: bool) -> torch.Tensor:
        weight = torch.ones(3, requires_grad=True)
        optimizer: Any = getattr(torch.optim, kind)([weight], lr=0.1, fused=True)
        assert _torch.supports_division(optimizer)
        weight.grad = torch.full((3,), 6.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(divisor), torch.tensor(float(skip))
        optimizer.step()
        assert torch.equal(weight.grad, torch.full((3,), 6.0 / divisor)) or skip
        return weight.detach()

    assert not torch.equal(stepped(3.0, skip=False), torch.ones(3))
    assert torch.equal(stepped(3.0, skip=True), torch.ones(3))


def test_an_optimizer_without_a_fused_kernel_does_not_divide() -> None:
    assert not _torch.supports_division(torch.optim.NAdam([torch.ones(1, requires_grad=True)]))


def test_a_scaler_has_its_scale_once_it_has_scaled() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert _torch.scale_of(scaler) is None
    scaler.scale(torch.ones(1))
    scale = _torch.scale_of(scaler)
    assert scale is not None and float(scale) == 8.0
    assert _torch.scale_of(torch.amp.GradScaler("cpu", enabled=False)) is None


def test_communication_hooks_are_seen_and_one_can_be_hidden_from_copies(ddp: Any) -> None:
    assert not _torch.has_comm_hook(ddp) and _torch.comm_hooks(ddp) == []
    ddp.register_comm_hook(None, allreduce_hook)
    assert _torch.has_comm_hook(ddp) and _torch.comm_hooks(ddp) == [allreduce_hook]
    _torch.hide_comm_hook(ddp)
    assert _torch.comm_hooks(ddp) == [] and _torch.has_comm_hook(ddp)
    assert not _torch.has_comm_hook(copy.deepcopy(ddp))


def test_buckets_are_rebuilt_after_the_first_pass(ddp: Any) -> None:
    seen = []
    for _ in range(3):
        ddp(torch.ones(1, 3)).sum().backward()
        seen.append(_torch.has_rebuilt_buckets(ddp))
    assert seen == [False, True, True]


def test_a_model_within_join_says_so(ddp: Any) -> None:
    assert not _torch.in_join(ddp)
    with ddp.join():
        assert _torch.in_join(ddp)
        ddp(torch.ones(1, 3)).sum().backward()


def test_a_shard_of_a_sharded_parameter_is_its_own_memory(sharded: Any) -> None:
    weight = sharded[0].weight
    assert type(_torch.shard_of(weight)) is torch.Tensor and _torch.shard_of(weight).shape == (2, 3)
    assert _torch.shard_of(weight).data_ptr() == weight.to_local().data_ptr()


def test_a_sharded_module_still_has_its_own_class(sharded: Any) -> None:
    assert _torch.original_type(sharded) is nn.Sequential is not type(sharded)
    assert _torch.original_type(sharded[0]) is nn.Linear


def test_a_sharded_pass_has_finished_in_a_callback_that_a_gradient_requests_if_it_is_the_last(sharded: Any) -> None:
    finished = []

    def note() -> None:
        finished.append(_torch.backward_finished(sharded))

    def arrived(_: torch.Tensor) -> None:
        note()
        _torch.after_backward(note)

    sharded[0].weight.register_post_accumulate_grad_hook(arrived)
    sharded(torch.ones(1, 3)).sum().backward()
    sharded.set_is_last_backward(False)
    sharded(torch.ones(1, 3)).sum().backward()
    assert finished == [False, True, False, False]


def test_a_compiled_module_leads_to_the_one_it_wraps() -> None:
    model = nn.Linear(2, 2)
    compiled: Any = torch.compile(model, backend="eager")
    assert _torch.uncompiled(compiled) is model and _torch.uncompiled(model) is model


def test_the_jobs_store_is_found(ddp: Any) -> None:
    _torch.default_store().set("found", "yes")
    assert _torch.default_store().get("found") == b"yes"
    assert isinstance(_torch.PrefixStore("a", _torch.default_store()), _torch.Store)
    assert _torch.GradBucket.__name__ == "GradBucket"
