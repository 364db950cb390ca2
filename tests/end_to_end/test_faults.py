"""What must not happen to a job, whatever happens to the parts around it; and what must be known after the worst."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from foreshock_recorder.layout import JSON_OFFSET
from foreshock_recorder.reader import RingReader
from tests.support.collector_process import Collector, left
from tests.support.launched_jobs import STANDALONE, TRAINING, Job, recorders, said
from tests.support.waiting import eventually

SILENT_MEMORY_KIB = 2 * 1024
"""Six thousand records, kept as the recorder reads them, would be 5 MiB."""


@pytest.fixture
def black_hole() -> Iterator[str]:
    """An address that takes connections and says nothing, ever."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def only_recorder(folder: Path) -> int:
    """Each rank starts one; all but the first see that it is there, and leave."""
    (found,) = eventually(lambda: len(pids := recorders(folder)) == 1 and pids, "a single recorder")
    return int(found)


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def test_weights_are_the_same_with_a_collector_without_one_and_with_one_that_swallows_everything(
    collector: Collector, black_hole: str, job: Job, tmp_path: Path
) -> None:
    said(job("plain", "", steps=40, attach_ranks=[], weights=str(tmp_path / "plain")))
    plain = torch.load(tmp_path / "plain-0.pt")
    for name, address in (("served", collector.address), ("refused", "127.0.0.1:9"), ("swallowed", black_hole)):
        text = said(job(name, address, steps=40, weights=str(tmp_path / name)))
        assert "rank 1 done" in text
        lines = [line for line in text.splitlines() if line.startswith("foreshock:")]
        # The line at attach, and the page's address or one warning.
        assert len(lines) == 2, text
        assert (f"run {name}: {collector.url}/run/{name}" in text) == (name == "served")
        for rank in (0, 1):
            weights = torch.load(tmp_path / f"{name}-{rank}.pt")
            assert all(torch.equal(weights[key], plain[key]) for key in plain)


def test_memory_is_bounded_however_long_nobody_takes_the_records(black_hole: str, job: Job, tmp_path: Path) -> None:
    rings = tmp_path / "rings"
    job("silent", black_hole, ranks=1, steps=10**9, pace=0.001)
    (log,) = eventually(lambda: list(rings.rglob("recorder.log")), "a recorder's log")
    eventually(lambda: "no answer" in log.read_text(), "its complaint")
    recorder = only_recorder(rings)
    (ring,) = rings.rglob("*.ring")
    reader = RingReader(ring)
    size, memory, launched = ring.stat().st_size, resident_kib(recorder), reader.begun
    eventually(lambda: reader.begun > launched + 6000, "six thousand more steps")
    reader.close()
    assert ring.stat().st_size == size <= 4 * 2**20
    assert resident_kib(recorder) - memory < SILENT_MEMORY_KIB


def test_a_pipeline_ends_with_its_job_though_the_recorder_goes_on_trying(black_hole: str, tmp_path: Path) -> None:
    rings, log = tmp_path / "rings", tmp_path / "log"
    train = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", TRAINING]
    pipeline = f"{shlex.join(map(str, train))} 2>&1 | tee {shlex.quote(str(log))}"
    environment = {**os.environ, "FORESHOCK_RING_DIR": str(rings), "FORESHOCK_COLLECTOR": black_hole}
    subprocess.run(
        ["bash", "-c", pipeline], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60
    )
    assert "rank 0 done" in log.read_text()
    # It has not given up yet, so the pipeline did not end because it was gone.
    os.kill(only_recorder(rings), signal.SIGTERM)
    eventually(lambda: not recorders(rings), "its end")


def test_when_a_pod_dies_with_its_job_the_nan_step_has_arrived(collector: Collector, job: Job) -> None:
    """torchrun is the first process of the namespace: all others are killed with it, the recorder too."""
    own = () if os.getuid() == 0 else ("--user", "--map-root-user")
    process = job(
        *("pod", collector.address),
        torchrun=STANDALONE,
        under=("unshare", *own, "--pid", "--fork", "--kill-child", "--mount-proc"),
        steps=200,
        nan_at=60,
        nan_rank=1,
        raise_at=60,
    )
    assert "the script gives up" in said(process)
    run = eventually(lambda: (seen := collector.run("pod"))["incidents"] and seen, "the incident")
    assert run["incidents"][0]["verdict"]["first_bad_step"] == 60
    assert run["counters"]["steps"] == 61


def test_two_nodes_are_one_run_with_all_its_ranks(collector: Collector, job: Job, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = []
    for node in (0, 1):
        place = ("--nnodes", "2", "--node-rank", str(node), "--rdzv-backend", "c10d", "--rdzv-endpoint", meeting)
        own = {"FORESHOCK_RING_DIR": str(tmp_path / f"node-{node}")}
        nodes.append(job("wide", collector.address, ranks=2, torchrun=place, environment=own, steps=150, pace=0.01))
    folders = (tmp_path / "node-0", tmp_path / "node-1")
    eventually(lambda: all(len(recorders(folder)) == 1 for folder in folders), "a recorder on each node")
    for process in nodes:
        assert "done" in said(process)
    run = left(collector, "wide")
    assert collector.names() == ["wide"]
    assert [rank["rank"] for rank in run["ranks"]] == [0, 1, 2, 3]
    assert {rank["last_step"] for rank in run["ranks"]} == {149}
    assert run["counters"]["steps"] == 150


def test_a_killed_recorder_is_replaced_and_no_step_is_lost_or_counted_twice(
    collector: Collector, job: Job, tmp_path: Path
) -> None:
    process = job("replaced", collector.address, steps=650, pace=0.02)
    eventually(
        lambda: "replaced" in collector.names() and collector.run("replaced")["counters"]["steps"] > 50, "some steps"
    )
    first = only_recorder(tmp_path)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: first not in recorders(tmp_path), "its end")
    assert only_recorder(tmp_path) != first
    assert "rank 0 done" in said(process)
    run = left(collector, "replaced")
    assert run["counters"]["steps"] == 650
    assert collector.get("/api/v1/runs/replaced/steps?limit=2000")["step"] == list(range(650))
    assert run["counters"]["dropped"] == dict.fromkeys(run["counters"]["dropped"], 0)


def test_a_training_whose_rings_are_overwritten_has_the_same_weights_and_all_its_steps(
    collector: Collector, job: Job, tmp_path: Path
) -> None:
    said(job("plain", "", steps=300, attach_ranks=[], weights=str(tmp_path / "plain")))
    process = job("overwritten", collector.address, steps=300, pace=0.01, weights=str(tmp_path / "overwritten"))
    eventually(
        lambda: "overwritten" in collector.names() and collector.run("overwritten")["counters"]["steps"] > 20,
        "some steps",
    )
    rings = list((tmp_path / "rings").rglob("*.ring"))
    for ring in rings:
        with ring.open("r+b", buffering=0) as file:
            file.write(os.urandom(JSON_OFFSET))
    assert len(rings) == 2 and "rank 1 done" in said(process)
    run = left(collector, "overwritten")
    assert collector.get("/api/v1/runs/overwritten/steps")["step"] == list(range(300))
    assert run["counters"]["dropped"] == dict.fromkeys(run["counters"]["dropped"], 0)
    for rank in (0, 1):
        plain, trained = (torch.load(tmp_path / f"{name}-{rank}.pt") for name in ("plain", "overwritten"))
        assert all(torch.equal(trained[key], plain[key]) for key in plain)


def test_a_stopped_collector_stores_what_it_was_sent_and_ends_in_time(collector: Collector, job: Job) -> None:
    process = job("drained", collector.address, steps=400, pace=0.01)
    eventually(
        lambda: "drained" in collector.names() and collector.run("drained")["counters"]["steps"] > 20, "some steps"
    )
    assert collector.stop() == 0
    collector.start()
    assert "rank 0 done" in said(process)
    run = left(collector, "drained")
    assert collector.get("/api/v1/runs/drained/steps")["step"] == list(range(400))
    assert run["counters"]["steps"] == 400
