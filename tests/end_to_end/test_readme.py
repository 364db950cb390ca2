"""What README.md tells people to type does what it says there."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.repository import ROOT
from tests.support.typed_commands import typed_commands
from tests.support.waiting import eventually

README = (ROOT / "README.md").read_text("utf-8")
BIN = Path(sys.executable).parent
SCRIPT = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
{attach}
for step in range(3):
    loss = model(torch.randn(8, 4)).square().mean()
    {observe}
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("last loss: " + repr(loss))
dist.destroy_process_group()
"""


def pattern(shown: str) -> str:
    """What fits a line as it is shown, whatever its numbers: when a network explodes is up to a machine's rounding."""
    text = re.escape(shown)
    text = re.sub(r"\b\d+\b", r"\\d+", text)
    return re.sub("─+", "─+", re.sub(r"(\\ )+", r"\\s+", text))


def test_a_collector_and_a_job_by_the_readmes_lines(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    (_, serve, (listening,)), *rest = [
        each for each in typed_commands(README) if not each.line.startswith("pip install ")
    ]
    base = {name: value for name, value in os.environ.items() if not name.startswith("FORESHOCK_")}
    base |= {"PATH": f"{BIN}:{os.environ['PATH']}", "FORESHOCK_RING_DIR": str(tmp_path / "rings")}
    told = {"GRPC_PORT": "0", "HTTP_PORT": "0", "READY_FILE": str(ready), "DATABASE": str(tmp_path / "db")}
    environment = base | {f"FORESHOCK_COLLECTOR_{name}": value for name, value in told.items()}
    with subprocess.Popen(
        ["bash", "-c", f"exec {serve}"], env=environment, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            said = server.stderr.readline()
            eventually(ready.exists, "a collector that listens")
            places = json.loads(ready.read_text())

            def here(text: str, host: str = "127.0.0.1") -> str:
                for there, place in (("monitor:4327", places["grpc"]), ("monitor:9327", places["http"])):
                    text = text.replace(there, f"{host}:{place.rpartition(':')[2]}")
                return text

            # All but the time.
            assert said.split(" ")[1:] == (here(listening, socket.gethostname()) + "\n").split(" ")[1:]

            exports: dict[str, list[str]] = {}
            (tmp_path / "examples").symlink_to(ROOT / "examples")
            for machine, line, shown in rest:
                if line.startswith("export "):
                    exports.setdefault(machine, []).append(here(line))
                    continue
                script = "\n".join((*exports[machine], line))
                result = subprocess.run(
                    ["bash", "-c", script], env=base, cwd=tmp_path, capture_output=True, text=True, timeout=300
                )
                # The run has failed, and `foreshock status` says so by its exit code too.
                assert result.returncode == (1 if line == "foreshock status" else 0), result.stderr
                for wanted in shown:
                    patterns = [pattern(here(wanted, host)) for host in ("127.0.0.1", socket.gethostname())]
                    assert re.search("|".join(patterns), result.stdout + result.stderr), wanted
            assert "exploding_gradients" in (tmp_path / "report.html").read_text("utf-8")
        finally:
            server.terminate()
    assert server.returncode == 0


def test_the_readmes_three_lines_add_foreshock_to_a_script(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    *attach, observe = filter(None, block.splitlines())
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(attach="\n".join(attach), observe=observe))
    environment = {**os.environ, "FORESHOCK_RING_DIR": str(tmp_path / "rings"), "FORESHOCK_COLLECTOR": "127.0.0.1:9"}
    result = subprocess.run(
        [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", script],
        env=environment | {"FORESHOCK_STRICT": "1", "FORESHOCK_RUN": "three-lines"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert len(attach) == 2 and observe.startswith("watch.observe(")
    assert result.returncode == 0, result.stderr
    assert re.search(r"foreshock: watching Linear .* on 2 ranks, .*run three-lines", result.stderr), result.stderr
    assert "last loss: tensor(" in result.stdout
