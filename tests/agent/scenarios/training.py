"""A small DDP training for the jobs of these tests, and a way to run many scenarios in one job.

A scenario is a function of no arguments that every rank runs; what it returns on each rank, as JSON, is the result.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import foreshock
from foreshock import _log
from foreshock._arithmetic import arithmetic
from foreshock._attach import attach
from foreshock._kernels import choice
from foreshock._measure.rank_sums import RankSums
from foreshock._output import device_record
from foreshock._output.pinned_ring import PinnedRing
from foreshock._output.record import Record
from foreshock._watch import ActiveWatch
from foreshock_protos.columns import MEASURED_NAMES
from foreshock_recorder import records as ring_records
from foreshock_recorder.layout import EDITED, GRADIENT_UNKNOWN, NOT_STEPPED
from foreshock_recorder.reader import RingReader
from foreshock_recorder.ring import Ring
from tests.support.cudart import Cudart

STEPS = 6
WIDTH = 12


def make_model(*, dtype: torch.dtype = torch.float32, **ddp: Any) -> DistributedDataParallel:
    """The same weights each time, in several buckets."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    return DistributedDataParallel(layers.to(dtype), bucket_cap_mb=0.001, **ddp)


def make_optimizer(model: nn.Module, kind: str = "AdamW", *, fused: bool = False) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, fused=fused)
    return optimizer


def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, WIDTH, generator=generator).to(dtype)
    loss: Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return loss


def batches(*, same: bool = False) -> torch.Generator:
    """A rank's own data; or the same on all ranks."""
    return torch.Generator().manual_seed(7 if same else 7 + dist.get_rank())


def train(
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = STEPS,
    before_step: Callable[[], Any] = lambda: None,
    before_backward: Callable[[int, Tensor], Any] = lambda *_: None,
) -> list[Tensor]:
    """Its weights in the end."""
    data = batches()
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, data)
        before_backward(step, loss)
        loss.backward()  # type: ignore[no-untyped-call]
        before_step()
        optimizer.step()
    return weights(model)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def apart(left: list[Tensor], right: list[Tensor]) -> float:
    """How far, relative to the weights."""
    return max(float(((a - b).abs() / (a.abs() + 1e-3)).max()) for a, b in zip(left, right, strict=True))


def alike(mine: list[Tensor]) -> float:
    """How far this rank's weights are from rank 0's."""
    theirs = [w.clone() for w in mine]
    for w in theirs:
        dist.broadcast(w, 0)
    return apart(theirs, mine)


def active(watch: foreshock.Watch) -> ActiveWatch:
    assert isinstance(watch, ActiveWatch), "it does not watch"
    return watch


def told(watch: foreshock.Watch) -> dict[str, Any]:
    """What the rank's ring holds: its records by column, what was dropped and why."""
    with ring_of(watch) as path:
        return told_in(path)


@contextlib.contextmanager
def ring_of(watch: foreshock.Watch) -> Iterator[Path]:
    """A copy of its ring, made from memory: who opens and closes the file itself lets go of the rank's lock on it."""
    with tempfile.NamedTemporaryFile(suffix=".ring") as copy:
        copy.write(active(watch)._record.ring.memory[:])
        copy.flush()
        yield Path(copy.name)


def told_in(path: Path) -> dict[str, Any]:
    """The same of a ring's file."""
    reader = RingReader(path)
    records: list[dict[str, Any]] = []
    for sequence in range(1, reader.begun + 1):
        record = reader.read(sequence)
        assert isinstance(record, ring_records.Record)
        measured = None
        if record.measured is not None:
            measured = dict(zip(MEASURED_NAMES, record.measured, strict=False))
        records.append(
            {
                "step": record.step,
                "edited": bool(record.flags & EDITED),
                "stepped": not record.flags & NOT_STEPPED,
                "unknown": bool(record.flags & GRADIENT_UNKNOWN),
                "loss": record.loss,
                "measured": measured,
            }
        )
        if record.measured is not None:
            record.measured.release()
    found = {
        "records": records,
        "dropped": reader.dropped,
        "note": reader.last_error,
        "exit": reader.exit_reason.name,
        "detail": reader.exit_detail,
        "passes": reader.backward_passes,
    }
    reader.close()
    return found


def column(found: dict[str, Any], name: str) -> list[Any]:
    return [record["measured"][name] for record in found["records"]]


def wait_for_sums(watch: foreshock.Watch) -> None:
    """Wait for the sums over ranks, as training never does, so that each step's record has its own."""
    sums = active(watch).sums
    assert isinstance(sums, RankSums)
    for slot in sums._slots:
        if slot.work is not None:
            slot.work.wait()


@contextlib.contextmanager
def environment(**changes: str) -> Iterator[None]:
    """FORESHOCK_... for a while; "" is not set."""
    before = {name: os.environ.get(f"FORESHOCK_{name}") for name in changes}
    os.environ.update({f"FORESHOCK_{name}": text for name, text in changes.items()})
    try:
        yield
    finally:
        for name, text in before.items():
            os.environ.pop(f"FORESHOCK_{name}")
            if text is not None:
                os.environ[f"FORESHOCK_{name}"] = text


def error_of(call: Callable[[], Any]) -> str | None:
    """What it raised of ours, as "Class: message"."""
    try:
        call()
    except foreshock.ForeshockError as error:
        return f"{type(error).__name__}: {error}"
    return None


def use(path: str) -> None:
    """Take one of the ways through a step, `PATHS`, from the next attach on. "interpreter": the kernels themselves."""
    kernels = path in ("kernels", "interpreter")
    arithmetic.HOSTS = frozenset({"cpu"} if path == "host" else ())
    choice.DEVICES = frozenset({"cpu"} if kernels else ())
    vars(attach)["record_for"] = pinned_record if kernels else device_record.record_for
    if path == "kernels":
        # Imports Triton.
        from tests.support.kernels_in_torch import replace_kernels

        replace_kernels()


def pinned_record(ring: Ring, _: torch.device, numbers: arithmetic.Arithmetic) -> Record:
    """A record that a device would write."""
    return device_record.DeviceRecord(ring, numbers, PinnedRing(ring, Cudart()))


def main(scenarios: dict[str, Callable[[], Any]], *, group: bool = True) -> None:
    """Run those named in the arguments after the folder for results; each rank writes a file there.

    group: the ranks are a process group; else the only rank has none.
    """
    folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    use(os.environ.get("TEST_ARITHMETIC", "host"))
    if group:
        dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name in names:
        # Each says its lines anew.
        _log._logged.clear()
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            result = scenarios[name]()
        sys.stderr.write(said.getvalue())
        found[name] = {"result": result, "said": said.getvalue().splitlines()}
    Path(folder, f"{dist.get_rank() if group else 0}.json").write_text(json.dumps(found))
    if group:
        dist.barrier()
    # Not through the interpreter's end: a thread of gloo that lets go of a collective meanwhile aborts the process,
    # in trainings without Foreshock too (torch 2.13).
    sys.stderr.flush()
    os._exit(0)
