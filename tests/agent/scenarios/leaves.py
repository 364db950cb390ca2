"""A training that leaves in the way that its argument names, or one in a forked process for each of several. See
test_leaving.py."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import foreshock
from foreshock._output import staging
from foreshock._output.device_record import DeviceRecord
from foreshock._output.record import Record
from foreshock._watch import ActiveWatch

MODE, PLACE = sys.argv[1], Path(sys.argv[2])
RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def begin(rank: int, ranks: int) -> tuple[Any, Any, foreshock.Watch]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{PLACE}/store-{MODE}", rank=rank, world_size=ranks)
    model = DistributedDataParallel(nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, optimizer, foreshock.attach(model, optimizer, run=MODE)


def steps(model: Any, optimizer: Any, count: int = 3) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()


def handled(error: BaseException, status: Any) -> None:
    try:
        raise error
    except BaseException:
        sys.exit(status)


class Device:
    """Values that are under way on it, and never arrive."""

    def query(self) -> bool:
        if MODE == "device_failed":
            raise RuntimeError("CUDA error: device-side assert triggered")
        return False


def staged(record: Record) -> DeviceRecord:
    """The record of a device, with one value under way."""
    value, target = torch.ones(1), object.__new__(staging.StagedRing)
    target._staged = deque([staging._Stage(host=value, whole=value, arrived=Device(), deliver=print)])
    return DeviceRecord(record.ring, record._arithmetic, target)


def main() -> None:
    if MODE == "old_error":
        sys.last_value = NameError("of an earlier cell")
    if MODE == "handler_before":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to end"))
    model, optimizer, watch = begin(RANK, RANKS)
    steps(model, optimizer)
    if MODE == "exit_1":
        sys.exit(1)
    if MODE == "exit_0":
        sys.exit(0)
    if MODE == "exit_text":
        sys.exit("no data left")
    if MODE == "exit_while_handling":
        handled(ValueError("bad batch"), 1)
    if MODE == "exit_0_while_handling":
        handled(ValueError("bad batch"), 0)
    if MODE == "exit_while_interrupted":
        handled(KeyboardInterrupt(), 1)
    if MODE == "exit_caught":
        try:
            sys.exit(1)
        except SystemExit:
            steps(model, optimizer)
    if MODE.startswith("device"):
        assert isinstance(watch, ActiveWatch)
        watch.guard._strict = False
        watch._record = staged(watch._record)
    if MODE == "raises" or MODE.startswith("device"):
        raise ValueError("bad batch")
    if MODE == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
    if MODE == "block_raises":
        try:
            with watch:
                raise ValueError("bad batch")
        except ValueError:
            sys.exit(0)
    if MODE == "block_interrupted":
        with watch:
            raise KeyboardInterrupt
    if MODE == "block":
        with watch:
            steps(model, optimizer)
    if MODE == "exit_after_detach":
        watch.detach()
        assert sys.exit is EXIT
    if MODE in ("collective", "handler_before", "handler_after", "worker"):
        stay(model)


def stay(model: Any) -> None:
    """Until a signal comes."""
    if MODE == "handler_after":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to end"))
    if MODE == "worker" and (child := os.fork()):
        Path(PLACE, "pid").write_text(str(child))
        os.waitpid(child, 0)
        return
    Path(PLACE, f"ready-{MODE}-{RANK}").touch()
    if MODE == "collective" and RANK == 0:
        # The other rank never comes.
        model(torch.randn(16, 8)).square().mean().backward()
    time.sleep(60)


def spawned(rank: int) -> None:
    model, optimizer, _ = begin(rank, 2)
    steps(model, optimizer)
    if rank == 1 and MODE == "spawned_raises":
        raise ValueError("bad batch")


def each(modes: list[str]) -> str | None:
    """In the child, its mode. In the parent, None once all are over: exit codes as a file."""
    codes = {}
    for first in range(0, len(modes), 5):
        children = {}
        for mode in modes[first : first + 5]:
            if not (child := os.fork()):
                return mode
            children[mode] = child
        for mode, child in children.items():
            codes[mode] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    Path(PLACE, "codes.json").write_text(json.dumps(codes))
    return None


EXIT = sys.exit
if __name__ == "__main__":
    if "," in MODE:
        # Importing torch takes seconds, and the first optimizer imports more: once for all. Each child goes on to an
        # end of its own.
        importlib.import_module("torch._dynamo")
        # The children's interpreters end sooner where they do not look through all of torch for garbage.
        gc.freeze()
        MODE = each(MODE.split(",")) or "over"
    if MODE == "over":
        pass
    elif MODE.startswith("spawned"):
        spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
        spawn(spawned, nprocs=2)
    else:
        main()
