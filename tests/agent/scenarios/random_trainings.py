"""The scenario of test_property.py: random trainings beside a reference in float64. Each rank runs it."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import foreshock
from tests.agent.scenarios.training import main, told, use

RATE, STEPS = 0.05, 3
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Of an average over two ranks and its norm, relative."""
KERNELS = [] if find_spec("triton") is None else ["kernels"]
POLICIES: dict[str, Any] = {
    "none": None,
    "norm": foreshock.NormClip(max_norm=0.3),
    "loose norm": foreshock.NormClip(max_norm=1e6),
    "value": foreshock.ValueClip(clip_value=0.02),
    "adaptive": foreshock.AdaptiveClip(max_norm=0.3),
}


@st.composite
def trainings(draw: st.DrawFn) -> dict[str, Any]:
    dtype = draw(st.sampled_from(list(ROUNDING)))
    # Torch's fused SGD forgets elements of a bfloat16 parameter on the CPU, without Foreshock too (2.13).
    fused = dtype != torch.bfloat16 and draw(st.booleans())
    return {
        "widths": draw(st.lists(st.integers(1, 33), min_size=2, max_size=6)),
        "bucket_cap_mb": draw(st.sampled_from([1e-5, 0.001, 25.0])),
        "view": draw(st.booleans()),
        "accumulate": draw(st.integers(1, 3)),
        "dtype": dtype,
        "fused": fused,
        "policy": draw(st.sampled_from(list(POLICIES))),
        "local_norms": draw(st.booleans()),
        "skip": fused and draw(st.booleans()),
        "poison": draw(st.sampled_from([None, None, 0, 1, 2])),
        "path": draw(st.sampled_from(["host", "device", *KERNELS])),
        "seed": draw(st.integers(0, 1000)),
    }


def network(case: dict[str, Any]) -> nn.Sequential:
    torch.manual_seed(case["seed"])
    layers: list[nn.Module] = []
    for inward, outward in zip(case["widths"], case["widths"][1:], strict=False):
        layers += [nn.Linear(inward, outward), nn.Tanh()]
    return nn.Sequential(*layers).to(case["dtype"])


def passes(case: dict[str, Any], step: int, model: Any) -> None:
    """Forward and backward on this rank's data, as often as a step accumulates."""
    for part in range(case["accumulate"]):
        generator = torch.Generator().manual_seed(1000 * case["seed"] + 100 * step + 10 * part + dist.get_rank())
        x = torch.randn(5, case["widths"][0], generator=generator).to(case["dtype"])
        bad = case["poison"] == step and part == 0 and dist.get_rank() == 1
        waits = part < case["accumulate"] - 1 and isinstance(model, DistributedDataParallel)
        with model.no_sync() if waits else nullcontext():
            ((model(x) - 1).square().mean() * (math.nan if bad else 1.0)).backward()


def reference(case: dict[str, Any], step: int, weights: list[Tensor]) -> tuple[list[Tensor], float, float]:
    """The averaged gradient in float64, the norm of this rank's own, the largest of any rank. Without DDP."""
    alone = network(case)
    for parameter, weight in zip(alone.parameters(), weights, strict=True):
        parameter.data.copy_(weight)
    passes(case, step, alone)
    own = [p.grad.double() for p in alone.parameters() if p.grad is not None]
    local = norm_of(own)
    largest = torch.tensor(local, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    for gradient in own:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return own, local, float(largest)


def norm_of(gradients: list[Tensor]) -> float:
    return math.sqrt(math.fsum(float(g.square().sum()) for g in gradients))


def clipped(policy: str, gradients: list[Tensor], norm: float) -> tuple[list[Tensor], float]:
    """As the documentation of each policy says."""
    if policy == "value":
        return [g.clamp(-0.02, 0.02) for g in gradients], 1.0
    limit = {"none": math.inf, "loose norm": 1e6}.get(policy, 0.3)
    coefficient = min(1.0, limit / (norm + 1e-6)) if math.isfinite(norm) else 1.0
    return [g * coefficient for g in gradients], coefficient


def differences(case: dict[str, Any]) -> list[str]:
    """What is not as the reference says."""
    model = DistributedDataParallel(
        network(case), bucket_cap_mb=case["bucket_cap_mb"], gradient_as_bucket_view=case["view"]
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, fused=case["fused"])
    rounding, wrong = ROUNDING[case["dtype"]], []
    # A fused kernel takes its divisor in float32, whatever the weights.
    moving = max(rounding, 1e-6) if case["fused"] else rounding
    # A GPU's way through a step, or a CPU's.
    use(case["path"])
    watch = foreshock.attach(
        model, optimizer, clip=POLICIES[case["policy"]], skip=case["skip"], local_norms=case["local_norms"]
    )
    expected: list[tuple[float, float, float]] = []

    def compare(step: int, what: str, found: float, wanted: float) -> None:
        same = found == wanted or (math.isnan(found) and math.isnan(wanted))
        if not same and not abs(found - wanted) <= rounding * max(abs(wanted), 1e-3):
            wrong.append(f"step {step}: {what} {found!r}, not {wanted!r}")

    with watch:
        for step in range(STEPS):
            before = [p.detach().clone() for p in model.parameters()]
            gradients, local, largest = reference(case, step, before)
            norm = norm_of(gradients)
            optimizer.zero_grad(set_to_none=not case["view"])
            passes(case, step, model)
            optimizer.step()
            moved, coefficient = clipped(case["policy"], gradients, norm)
            expected.append((norm, local, coefficient))
            left_out = case["skip"] and not math.isfinite(norm)
            for old, parameter, gradient in zip(before, model.parameters(), moved, strict=True):
                wanted = old.double() if left_out else old.double() - RATE * gradient
                apart = (parameter.detach().double() - wanted).abs()
                # What was added up may be larger than what comes out: the ranks' gradients, the weight and its step.
                size = old.double().abs() + 1e-4
                if math.isfinite(norm):
                    size += RATE * largest * coefficient
                if not bool((apart <= 4 * moving * size).logical_or(wanted.isnan() & parameter.isnan()).all()):
                    wrong.append(f"step {step}: weights differ by {float((apart / size).max()):.3g}")
            if not math.isfinite(norm) and not left_out:
                break
        found = told(watch)
    for step, ((norm, local, coefficient), record) in enumerate(zip(expected, found["records"], strict=True)):
        compare(step, "global norm", record["measured"]["global_norm"], norm)
        compare(step, "clip coefficient", record["measured"]["clip_coefficient"], coefficient)
        if case["local_norms"]:
            compare(step, "local norm", record["measured"]["local_norm"], local)
    if found["dropped"]:
        wrong.append(f"dropped: {found['dropped']}")
    return wrong


def random_trainings() -> dict[str, Any]:
    """Both ranks draw alike, and fail alike: an example that shrinks on one alone would wait for the other."""
    seen: list[dict[str, Any]] = []

    @settings(max_examples=60, deadline=None, database=None, derandomize=True, print_blob=False)
    @given(case=trainings())
    def check(case: dict[str, Any]) -> None:
        wrong = differences(case)
        seen.append(case)
        everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, wrong)
        assert not any(everywhere), f"{case}: {everywhere}"

    try:
        check()
    except AssertionError as error:
        return {"wrong": str(error)[:2000], "seen": len(seen)}
    policies = {case["policy"] for case in seen}
    dtypes = {str(case["dtype"]) for case in seen}
    return {"wrong": "", "seen": len(seen), "policies": sorted(policies), "dtypes": sorted(dtypes)}


if __name__ == "__main__":
    main({name: value for name, value in vars(sys.modules[__name__]).items() if callable(value)})
