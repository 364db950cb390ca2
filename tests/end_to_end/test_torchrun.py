"""`foreshock run -- torchrun ...` watches scripts that know nothing of Foreshock, and they train as without it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.collector_process import Collector, left
from tests.support.commands import FORESHOCK
from tests.support.repository import ROOT
from tests.support.waiting import WAIT_SECONDS

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
STYLES = ["nanogpt", "mingpt", "dino", "mae", "detr", "timm", "torchvision", "fairseq", "ppo", "lora", "distillation"]
EXPLODES = """
import atexit
import os
import sys
import torch
import torch.distributed as dist

torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
model = torch.nn.parallel.DistributedDataParallel(layers)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
torch.manual_seed(1 + dist.get_rank())
for step in range(150):
    if step == 40:
        optimizer.param_groups[0]["lr"] = 0.5
    x = torch.randn(16, 8)
    optimizer.zero_grad()
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
with open(f"{sys.argv[1]}-{dist.get_rank()}", "wb") as file:
    file.write(weights)
dist.barrier()
# As in public_styles.py: gloo's threads may abort a process whose interpreter ends.
atexit._run_exitfuncs()
sys.stderr.flush()
os._exit(0)
"""
LOADS = """
import sys
import torch

OURS = {"foreshock", "foreshock_recorder", "foreshock_protos", "grpc"}


def imported():
    return sorted(OURS & {name.partition(".")[0] for name in sys.modules})


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.ones(1), imported(), "sitecustomize" in sys.modules, "torch" in sys.modules


def main():
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loaders = [
        torch.utils.data.DataLoader(Data(), num_workers=1, multiprocessing_context=context, batch_size=None)
        for context in ("fork", "spawn")
    ]
    items = [list(loader) for loader in loaders]
    for x, *_ in items[0]:
        model(x).sum().backward()
        optimizer.step()
    items.append(list(loaders[1]))
    print([[found for _, *found in loaded] == [[[], True, True]] * 4 for loaded in items], imported())


if __name__ == "__main__":
    main()
"""


def run(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in this folder."""
    own = {"FORESHOCK_RING_DIR": str(folder / "rings"), "FORESHOCK_STRICT": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=folder, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **own, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_an_unchanged_script_under_torchrun_explodes_with_the_same_weights_and_has_its_verdict_and_report(
    tmp_path: Path,
) -> None:
    (tmp_path / "train.py").write_text(EXPLODES)
    run(*TORCHRUN, "train.py", "alone", folder=tmp_path)
    watched = [*FORESHOCK, "run", "--embedded", "--run", "lr0.5", "--", *TORCHRUN, "train.py", "watched"]
    said = run(*watched, folder=tmp_path).stderr
    lines = [line for line in said.splitlines() if line.startswith("foreshock: ")]
    assert len(lines) == 4 and "on 2 ranks, observing only; run lr0.5" in lines[1]
    assert re.match(r"foreshock: run lr0\.5: Gradients exploded: .* Report: foreshock-lr0\.5\.html$", lines[3])
    assert "Gradients exploded" in (tmp_path / "foreshock-lr0.5.html").read_text()
    for rank in (0, 1):
        assert (tmp_path / f"watched-{rank}").read_bytes() == (tmp_path / f"alone-{rank}").read_bytes()


def test_public_styles_under_torchrun_train_as_without_and_have_their_norms_and_no_incident(
    collector: Collector, tmp_path: Path
) -> None:
    for name in ("alone", "watched"):
        (tmp_path / name).mkdir()
    script = str(ROOT / "tests/end_to_end/public_styles.py")
    run(*TORCHRUN, script, str(tmp_path / "alone"), *STYLES, folder=tmp_path)
    command = [*FORESHOCK, "run", "--collector", collector.address, "--", *TORCHRUN]
    run(*command, script, str(tmp_path / "watched"), *STYLES, folder=tmp_path)
    for name in STYLES:
        told = left(collector, name)
        assert told["incidents"] == [] and told["condition"] == "ended", name
        steps: dict[str, list[Any]] = collector.get(f"/api/v1/runs/{name}/steps")
        for rank in (0, 1):
            alone, watched = (torch.load(tmp_path / each / f"{name}-{rank}.pt") for each in ("alone", "watched"))
            assert all(map(torch.equal, alone["weights"], watched["weights"])), name
            assert alone["losses"] == watched["losses"], name
            # The first step is measured as its optimizer finds it, after what the script has changed.
            assert steps["global_norm"][1:] == pytest.approx(watched["norms"][1:], rel=1e-5), name


def test_workers_that_load_data_import_nothing_of_foreshock(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(LOADS)
    done = run(*FORESHOCK, "run", "--", sys.executable, "train.py", folder=tmp_path, FORESHOCK_COLLECTOR="127.0.0.1:9")
    assert done.stdout == "[True, True, True] ['foreshock', 'foreshock_protos', 'foreshock_recorder']\n", done.stderr
