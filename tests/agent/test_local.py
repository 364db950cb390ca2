"""A rank's own gradient, and the sums over ranks that nobody waits for."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.futures import Future

from foreshock._arithmetic.arithmetic import arithmetic_for
from foreshock._arithmetic.parameters import plan_parameters
from foreshock._measure.local import LocalNorms
from foreshock._measure.rank_sums import succeeded
from tests.support.torch_jobs import Job


def local_norms() -> tuple[LocalNorms, list[nn.Parameter]]:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    parameters = list(model.parameters())
    plan = plan_parameters(model, torch.optim.SGD(parameters, lr=0.1))
    return LocalNorms(plan, arithmetic_for(torch.device("cpu"))), parameters


def filled(parameters: list[nn.Parameter], value: float) -> list[Tensor]:
    return [torch.full_like(p, value) for p in parameters]


def total(local: LocalNorms) -> float | None:
    return None if local.summary is None else float(local.summary.total)


def test_a_backward_pass_is_the_sum_of_its_buckets_in_the_order_of_arrival() -> None:
    local, parameters = local_norms()
    last, first = parameters[2:], parameters[:2]
    local.add(last, filled(last, math.inf), first=True)
    local.add(first, filled(first, math.nan), first=False)
    local.close()
    assert local.summary is not None
    assert (float(local.summary.nan_parameters), float(local.summary.inf_parameters)) == (2.0, 2.0)
    assert float(local.summary.first_nonfinite) == 2.0


def test_what_a_broken_backward_pass_has_left_behind_does_not_count() -> None:
    local, parameters = local_norms()
    local.add(parameters[2:], filled(parameters[2:], 100.0), first=True)
    local.add(parameters[2:], filled(parameters[2:], 1.0), first=True)
    local.add(parameters[:2], filled(parameters[:2], 1.0), first=False)
    local.close()
    assert total(local) == pytest.approx(3.0)


def test_a_backward_pass_with_a_bucket_that_failed_has_no_norm_and_the_next_one_has() -> None:
    local, parameters = local_norms()
    local.add(parameters[2:], filled(parameters[2:], 1.0), first=True)
    with pytest.raises(ValueError):
        local.add(parameters[:2], [], first=False)
    local.close()
    assert total(local) is None
    local.add(parameters, filled(parameters, 1.0), first=True)
    local.close()
    assert total(local) == pytest.approx(3.0)


def test_gradients_of_other_parameters_are_not_ours() -> None:
    local, _ = local_norms()
    local.add([torch.ones(3)], [torch.full((3,), math.nan)], first=True)
    local.close()
    assert total(local) is None


def test_a_collective_has_succeeded_only_if_it_is_done_and_did_not_fail() -> None:
    futures: list[Any] = [Future(), Future(), Future()]
    futures[1].set_exception(RuntimeError("connection closed by peer"))
    futures[2].set_result([torch.ones(1)])
    assert [succeeded(future) for future in futures] == [False, False, True]


@pytest.mark.integration
def test_sums_wait_for_nobody_and_a_failed_one_is_never_taken(job: Job) -> None:
    done = job("sums.py")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    # Sequence, sum of losses, how many, idle ranks.
    assert found["rank 1 is late"] == [0.0, 0.0, 0.0, 0.0]
    assert found["both are there"] == [1.0, 5.0, 2.0, 2.0]
    assert found["an error on rank 1"] == [2.0, 0.0, 0.0, 2.0]
    assert found["six at once"] == [8.0, 2.0, 2.0, 2.0]
    assert found["rank 1 is gone"] == found["six at once"]
