"""TensorBoard has the norms of a run that explodes, its page and the verdict, without a change to the script."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.commands import FORESHOCK
from tests.support.waiting import WAIT_SECONDS

SCRIPT = """
import sys
import torch
from torch.utils.tensorboard import SummaryWriter

writer = SummaryWriter("board")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
for step in range(200):
    if step >= 60:
        optimizer.param_groups[0]["lr"] *= 1.3
    x = torch.randn(32, 8)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    writer.add_scalar("loss", loss, step)
    if not torch.isfinite(loss):
        sys.exit(3)
"""


def texts(board: EventAccumulator, name: str) -> list[str]:
    return [each.tensor_proto.string_val[0].decode() for each in board.Tensors(f"{name}/text_summary")]


def test_tensorboard_has_the_norms_the_page_and_the_verdict(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        [*FORESHOCK, "run", "--embedded", "--run", "mirrored", "--", sys.executable, "train.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False,
        env={
            **os.environ, "FORESHOCK_RING_DIR": str(tmp_path / "rings"), "FORESHOCK_STRICT": "1",
            "FORESHOCK_MIRROR": "tensorboard",
        },
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    page = done.stderr.splitlines()[0].removeprefix("foreshock: page at ")
    (events,) = (tmp_path / "board").iterdir()
    board = EventAccumulator(str(events), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    losses = {each.step: each.value for each in board.Scalars("loss")}
    mirrored = board.Scalars("foreshock/loss")
    for each in mirrored:
        same = each.value == losses[each.step] or math.isnan(each.value)
        assert same, (each, losses[each.step])
    # Its last look, as the rank leaves, has the step that was not finite.
    assert mirrored[-1].step == max(losses) and not math.isfinite(mirrored[-1].value)
    assert not math.isfinite(board.Scalars("foreshock/gradient_norm")[-1].value)
    assert texts(board, "foreshock/page") == [f"{page}/run/mirrored"]
    assert texts(board, "foreshock/notice")[-1].startswith("Exploding gradients: Gradients exploded")
