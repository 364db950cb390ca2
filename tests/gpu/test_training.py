"""Training on a card: right, without a wait for the device, and recorded up to a crash.

`make test` runs the same trainings on a CPU; `python -m benchmarks.gpu` runs them on a card.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from foreshock_protos.columns import MEASURED_NAMES
from foreshock_recorder.reader import RingReader
from foreshock_recorder.records import Record
from tests.gpu.scenarios import CASES, MAX_NORM, NAN_STEP, SETTINGS, STEPS
from tests.support.torch_jobs import run_job

SCRIPT = Path(__file__).with_name("scenarios.py")

pytestmark = pytest.mark.integration


class Job:
    """A job that has ended: its result, and the records in the rings of its ranks."""

    def __init__(self, folder: Path, device: str, *names: str, ranks: int = 1, killed: bool = False) -> None:
        self._rings = folder / "rings"
        # NCCL refuses two ranks on one card.
        backend = "nccl" if device != "cpu" and ranks == 1 else "gloo"
        result = folder / "result.json"
        # A card's ranks start as a user's do.
        done = run_job(
            self._rings, str(SCRIPT), device, backend, str(result), *names, ranks=ranks, torchrun=device != "cpu",
            TRITON_INTERPRET="0",
        )  # fmt: skip
        assert (done.returncode != 0) == killed, done.stderr
        self.result: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}

    def records(self, run: str, rank: int = 0) -> list[Record]:
        """Every record of a run."""
        (path,) = self._rings.glob(f"{run}/*/*-rank-{rank:05d}.ring")
        reader = RingReader(path)
        assert reader.dropped == {}, reader.last_error
        records = [reader.read(sequence) for sequence in range(1, reader.begun + 1)]
        assert all(isinstance(record, Record) for record in records)
        return [record for record in records if isinstance(record, Record)]

    def column(self, run: str, name: str, rank: int = 0) -> list[float]:
        """One measured column of a run, NaN where a record was not measured."""
        index = MEASURED_NAMES.index(name)
        rows = [record.measured for record in self.records(run, rank)]
        return [math.nan if row is None else row[index] for row in rows]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(device: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job of one rank that runs most scenarios."""
    return Job(tmp_path_factory.mktemp("alone"), device, "parity", "no_sync", "sharded", "skip")


def test_clipped_training_is_stock_training(alone: Job, device: str) -> None:
    found = alone.result["parity"]
    assert set(found) == set(CASES)
    for name, case in found.items():
        assert case["kernels"] == (device != "cpu"), name
        # Stock computes the norm of a bfloat16 model in bfloat16. Under a scaler, the forward pass rounds weights to
        # half precision, so that a difference in their last bit may become one of that precision.
        half = "bfloat16" in name or "scaled" in name
        # One rounding of bfloat16, 2^-9, in each step at most.
        assert case["apart"] < (STEPS * 2**-9 if half else 1e-4), name
        expected = pytest.approx(case["norms"], rel=1e-2 if half else 1e-4)
        assert alone.column(f"parity-{name}", "global_norm") == expected, name
        assert alone.column(f"parity-{name}", "local_norm") == expected, name
        assert [record.loss is not None for record in alone.records(f"parity-{name}")] == [True] * STEPS
        coefficients = [min(1.0, MAX_NORM / norm) for norm in case["norms"]]
        assert min(coefficients) < 0.5, name
        found_coefficients = alone.column(f"parity-{name}", "clip_coefficient")
        assert found_coefficients == pytest.approx(coefficients, rel=1e-2 if half else 1e-3), name


def test_no_step_waits_for_the_device(alone: Job) -> None:
    assert alone.result["no_sync"] == list(SETTINGS)
    for name in SETTINGS:
        assert all(math.isfinite(norm) for norm in alone.column(f"no-sync-{name}", "global_norm"))


def test_a_sharded_model_is_clipped_as_stock_and_no_step_waits_for_the_device(alone: Job) -> None:
    found = alone.result["sharded"]
    assert found["apart"] < 1e-4 and len(found["norms"]) == STEPS + 5
    assert alone.column("sharded", "global_norm") == pytest.approx(found["norms"], rel=1e-4)
    assert min(alone.column("sharded", "clip_coefficient")) < 0.5


def test_a_nan_is_skipped_and_recorded(alone: Job) -> None:
    assert alone.result["skip"] == {"finite": True, "tripped": False}
    at = [float(step == NAN_STEP) for step in range(NAN_STEP + 10)]
    assert alone.column("skip", "skipped") == at
    assert [float(count > 0) for count in alone.column("skip", "global_nan_parameters")] == at
    assert [float(number >= 0) for number in alone.column("skip", "first_nonfinite_local")] == at


def test_two_ranks_on_a_card_find_the_rank_with_the_nan(device: str, tmp_path: Path) -> None:
    job = Job(tmp_path, device, "blame", ranks=2)
    for rank in range(2):
        bad = [step for step, count in enumerate(job.column("blame", "global_nan_parameters", rank)) if count]
        assert bad[0] == NAN_STEP
    first = [job.column("blame", "local_nan_parameters", rank)[NAN_STEP] for rank in range(2)]
    assert first[0] == 0 and first[1] > 0
    assert job.column("blame", "global_norm", 0)[:NAN_STEP] == job.column("blame", "global_norm", 1)[:NAN_STEP]


def test_the_ring_holds_every_step_that_the_device_finished_before_a_kill(device: str, tmp_path: Path) -> None:
    job = Job(tmp_path, device, "crash", killed=True)
    norms = job.column("crash", "global_norm")
    assert len(norms) == STEPS
    assert all(math.isfinite(norm) for norm in norms)
