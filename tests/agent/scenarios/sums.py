"""Ranks that sum without waiting, one that is late and one that is gone. Each rank runs it; see test_local.py."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from foreshock._arithmetic.arithmetic import arithmetic_for
from foreshock._arithmetic.norms import Number
from foreshock._measure.rank_sums import SUM_FIELDS, RankSums
from foreshock._step import Observation

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, store = dist.get_rank(), _get_default_store()
group = dist.group.WORLD
assert group is not None
cpu = torch.device("cpu")
sums = RankSums(group, cpu, arithmetic_for(cpu))
found: dict[str, Any] = {}


def issue(sequence: int, loss: float) -> None:
    sums.prepare(sequence, None, Observation(None, loss))
    sums.issue()


def taken(newest: Sequence[Number]) -> list[float]:
    """Sequence, losses' sum and count, idle ranks."""
    names = ("reduced_loss_sum", "reduced_loss_count", "reduced_idle_ranks")
    return [float(newest[0]), *(float(newest[1 + SUM_FIELDS.index(name)]) for name in names)]


def finish() -> list[float]:
    while sums.under_way():
        time.sleep(0.001)
    return taken(sums.collect(None))


if rank == 1:
    store.wait(["rank 0 has looked"])
issue(1, 2.0 + rank)
if rank == 0:
    # Rank 1 has not issued its part yet: whoever waits here waits for ever.
    found["rank 1 is late"] = taken(sums.collect(None))
    store.set("rank 0 has looked", "")
found["both are there"] = finish()
if rank == 0:
    sums.prepare(2, None, Observation(None, math.nan))
sums.issue()
found["an error on rank 1"] = finish()
for sequence in range(3, 9):
    issue(sequence, 1.0)
found["six at once"] = finish()
if rank == 1:
    store.wait(["rank 0 has all"])
    os._exit(0)
store.set("rank 0 has all", "")
issue(9, 5.0)
found["rank 1 is gone"] = finish()
sys.stdout.write("RESULT " + json.dumps(found) + "\n")
sys.stdout.flush()
os._exit(0)
