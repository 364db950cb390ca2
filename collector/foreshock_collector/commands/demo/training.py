"""Runs the demo's training jobs with torchrun on two ranks, and cleans up afterwards."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from foreshock_collector.commands.demo import DemoError

RANKS = 2
_END_SECONDS = 15.0
_RECORDER_SECONDS = 10.0
_POLL_SECONDS = 0.1


def check_torch() -> None:
    """Raise `DemoError` if torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise DemoError("the demo trains a small model and needs torch: pip install torch")


@asynccontextmanager
async def training(run: str, *, collector: str, folder: Path, options: list[str]) -> AsyncIterator[asyncio.Task[None]]:
    """Start a job and yield a task that ends with it, raising `DemoError` if the job failed.

    However the block is left, the job, its ranks and its recorder have ended afterwards.
    """
    rings, log = folder / "rings", folder / f"{run}.log"
    environment = {
        **os.environ,
        "FORESHOCK_RING_DIR": str(rings),
        "FORESHOCK_COLLECTOR": collector,
        "FORESHOCK_EXPERIMENT": "demo",
        "FORESHOCK_RUN": run,
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as output:
        # In a separate session, Ctrl-C does not reach the job; it is terminated below, in order.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"),
            *("--module", "foreshock._demo_training", *options),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    ended = asyncio.create_task(_ended(process, log))
    try:
        yield ended
    finally:
        ended.cancel()
        await asyncio.gather(ended, return_exceptions=True)
        await end(process, seconds=_END_SECONDS)
        await _recorder_exited(rings)


async def end(process: asyncio.subprocess.Process, *, seconds: float) -> None:
    """Terminate a process; kill it if it does not exit in time."""
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), seconds)
    except TimeoutError:
        process.kill()
        await process.wait()


async def _ended(process: asyncio.subprocess.Process, log: Path) -> None:
    code = await process.wait()
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise DemoError(f"the training job exited with code {code}:\n{tail}")


async def _recorder_exited(rings: Path) -> None:
    """Wait for the recorder, which exits once the ranks are gone: first the run's folder goes, then its process."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _RECORDER_SECONDS
    while ((rings.is_dir() and any(rings.iterdir())) or _is_served(rings)) and loop.time() < deadline:
        await asyncio.sleep(_POLL_SECONDS)


def _is_served(rings: Path) -> bool:
    """Return whether a process has a folder of these rings in its command line, as recorders do."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        # It may end meanwhile.
        with suppress(OSError):
            if f"{rings}/".encode() in path.read_bytes():
                return True
    return False
