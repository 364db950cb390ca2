"""`foreshock run` watches trainers whose scripts know nothing of it, under the launchers that people use for each."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.support.collector_process import Collector, left
from tests.support.commands import FORESHOCK
from tests.support.repository import ROOT
from tests.support.waiting import WAIT_SECONDS, free_port

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(
        not all(map(find_spec, ("accelerate", "lightning", "transformers"))),
        reason="the trainers are not installed: make test-trainers",
    ),
]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# Without --multi_gpu, which needs no GPU, it starts one rank.
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "{port}"]
SCRIPT = str(ROOT / "tests/end_to_end/unchanged_trainers.py")


def run(folder: Path, *command: str, **environment: str) -> None:
    own = {"FORESHOCK_RING_DIR": str(folder / "rings"), "FORESHOCK_STRICT": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False,
        env={**os.environ, **own, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("trainer", "launcher"),
    [
        ("transformers", TORCHRUN),
        ("lightning", TORCHRUN),
        # It starts the other rank by itself.
        ("lightning", []),
        ("accelerate", TORCHRUN),
        ("accelerate", ACCELERATE),
    ],
    ids=["transformers", "lightning", "lightning alone", "accelerate", "accelerate launch"],
)
def test_an_unchanged_trainer_trains_as_without_and_has_its_norms(
    collector: Collector, tmp_path: Path, trainer: str, launcher: list[str]
) -> None:
    port = free_port()
    launch = [sys.executable, *(part.format(port=port) for part in launcher), SCRIPT]
    for name in ("alone", "watched"):
        (tmp_path / name).mkdir()
    run(tmp_path, *launch, str(tmp_path / "alone"), trainer)
    watched = [*FORESHOCK, "run", "--collector", collector.address, "--run", "night", "--"]
    run(tmp_path, *watched, *launch, str(tmp_path / "watched"), trainer)
    told = left(collector, "night")
    assert told["incidents"] == [] and told["condition"] == "ended" and len(told["ranks"]) == 2
    measured = collector.get("/api/v1/runs/night/steps")["global_norm"]
    for rank in (0, 1):
        alone, ours = (torch.load(tmp_path / name / f"{trainer}-{rank}.pt") for name in ("alone", "watched"))
        assert all(map(torch.equal, alone["weights"], ours["weights"])) and alone["norms"] == ours["norms"]
        # The first step is measured as its optimizer finds it, after the trainer has clipped.
        assert measured[0] == pytest.approx(0.5, rel=1e-4)
        assert measured[1:] == pytest.approx(ours["norms"][1:], rel=1e-4) and min(ours["norms"]) > 0.5
