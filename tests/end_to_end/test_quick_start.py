"""What docs/quickstart.md tells people to type works as it stands there, but for addresses and ports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.documents import Document
from tests.support.repository import ROOT
from tests.support.typed_commands import typed_commands
from tests.support.waiting import WAIT_SECONDS, eventually, free_port

PAGE = Document("docs/quickstart.md", (ROOT / "docs/quickstart.md").read_text("utf-8"))
RUN = "lr0.3"


def lines(heading: str, machine: str) -> list[str]:
    """What is typed on a machine, without the installation."""
    found = [each.line for each in typed_commands(PAGE.section(heading)) if each.machine == machine]
    return [line for line in found if not line.startswith("pip install ")]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    base = {name: value for name, value in os.environ.items() if not name.startswith("FORESHOCK_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return base | {"PATH": path, "FORESHOCK_RING_DIR": str(tmp_path / "rings")}


def typed(folder: Path, environment: dict[str, str], *commands: str) -> subprocess.CompletedProcess[str]:
    """Run commands one after another in one shell; the result of the last."""
    return subprocess.run(
        ["bash", "-c", "\n".join(commands)], env=environment, cwd=folder, capture_output=True, text=True,
        timeout=5 * WAIT_SECONDS, check=False,
    )  # fmt: skip


@contextmanager
def serving(folder: Path, environment: dict[str, str], *commands: str) -> Iterator[dict[str, str]]:
    """Run commands, the last of which is a collector on free ports, for as long as the block lasts; its addresses."""
    ready = folder / "ready.json"
    told = {"GRPC_PORT": "0", "HTTP_PORT": "0", "READY_FILE": str(ready)}
    *first, last = commands
    with subprocess.Popen(
        ["bash", "-c", "\n".join((*first, f"exec {last}"))],
        env=environment | {f"FORESHOCK_COLLECTOR_{name}": value for name, value in told.items()},
        cwd=folder,
    ) as server:
        try:
            eventually(ready.exists, "a collector that listens")
            places = json.loads(ready.read_text())
            yield {name: f"127.0.0.1:{place.rpartition(':')[2]}" for name, place in places.items()}
        finally:
            server.terminate()
    assert server.returncode == 0


def test_a_laptop_has_the_verdict_and_a_report(tmp_path: Path, environment: dict[str, str]) -> None:
    (line,) = lines("On a laptop", "laptop")
    done = typed(tmp_path, environment, line)
    assert done.returncode == 0, done.stderr
    assert f"foreshock: run {RUN}: Gradients exploded" in done.stderr
    assert "exploding_gradients" in (tmp_path / f"foreshock-{RUN}.html").read_text("utf-8")


def test_one_machine_has_a_collector_that_stays(tmp_path: Path, environment: dict[str, str]) -> None:
    with serving(tmp_path, environment, *lines("On one machine", "collector")) as places:
        here = environment | {"FORESHOCK_COLLECTOR": places["grpc"], "FORESHOCK_URL": f"http://{places['http']}"}
        results = {line: typed(tmp_path, here, line) for line in lines("On one machine", "training")}
    # The run has failed, and `foreshock status` says so by its exit code too.
    codes = {line: done.returncode for line, done in results.items()}
    assert codes == {line: int(line.startswith("foreshock status")) for line in results}, results
    assert "exploding_gradients" in (tmp_path / "report.html").read_text("utf-8")
    assert (tmp_path / "foreshock.db").stat().st_size > 0


def test_the_nodes_of_a_cluster_need_the_token(tmp_path: Path, environment: dict[str, str]) -> None:
    with serving(tmp_path, environment, *lines("On a cluster", "monitor")) as places:
        assert (tmp_path / "token").stat().st_mode & 0o077 == 0
        *variables, doctor, train = (
            re.sub(r"\bmonitor:(\d+)", lambda found: places["grpc" if found[1] == "4327" else "http"], line)
            for line in lines("On a cluster", "node")
        )
        checked = typed(tmp_path, environment, *variables, doctor)
        assert checked.returncode == 0, checked.stdout
        without = typed(tmp_path, environment, *variables, "unset FORESHOCK_TOKEN_FILE", "foreshock status")
        assert without.returncode == 2 and "401" in without.stderr
        # Of the two nodes, one is here.
        alone = train.replace("--nnodes 2", "--nnodes 1").replace("node1:29400", f"127.0.0.1:{free_port()}")
        assert alone != train
        trained = typed(tmp_path, environment, *variables, alone)
        assert trained.returncode == 0, trained.stderr
        status = typed(tmp_path, environment, *variables, "foreshock status")
    assert status.returncode == 1 and re.search(rf"^{re.escape(RUN)} +failed .*exploding", status.stdout, re.MULTILINE)
