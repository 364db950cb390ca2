"""`foreshock run --embedded` watches a script that knows nothing of Foreshock, and reports what became of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.commands import FORESHOCK
from tests.support.waiting import WAIT_SECONDS

SCRIPT = """
import sys
import torch

assert "foreshock" not in sys.modules
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
    if not torch.isfinite(loss):
        sys.exit(3)
"""


def test_an_unchanged_script_that_explodes_has_its_verdict_and_report(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    # The script is started by another process, as a launcher would.
    command = ["sh", "-c", f"{sys.executable} train.py; exit $?"]
    done = subprocess.run(
        [*FORESHOCK, "run", "--embedded", "--run", "lr/0.3", "--", *command],
        cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False,
        env={**os.environ, "FORESHOCK_RING_DIR": str(tmp_path / "rings"), "FORESHOCK_STRICT": "1"},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    page, watching, link, outcome = done.stderr.splitlines()
    url = page.removeprefix("foreshock: page at ")
    assert watching.startswith(
        "foreshock: watching Sequential (2 layers, 4 parameters) on 1 rank, observing only; run lr/0.3 to 127.0.0.1:"
    )
    assert link == f"foreshock: run lr/0.3: {url}/run/lr%2F0.3"
    assert re.match(r"foreshock: run lr/0\.3: Gradients exploded: .* Report: foreshock-lr-0\.3\.html$", outcome)
    assert "Gradients exploded" in (tmp_path / "foreshock-lr-0.3.html").read_text()
