"""`python -m foreshock_recorder`: started by the first rank that needs it, or by hand as a side-car."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import logging.handlers
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from foreshock_protos import DEFAULT_GRPC_PORT
from foreshock_recorder.ring import LOCK_NAME, ring_folder

_LOG_BYTES = 256 * 1024


def main(arguments: list[str] | None = None) -> int:
    """Run until the last rank has gone. 0: done, or another recorder is there already."""
    parser = argparse.ArgumentParser(prog="foreshock_recorder", description="Read the ranks' rings, tell a collector.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--folder", type=Path, help="folder of the run's rings")
    which.add_argument("--run", help="name of the run; its folder is found as the ranks find it")
    parser.add_argument("--collector", default="", help="host:port; default: this machine, default port")
    parser.add_argument("--linger", type=float, default=30.0, help="seconds to go on trying after the last rank")
    options = parser.parse_args(arguments)
    folder: Path = options.folder or ring_folder(options.run)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = _lock(folder / LOCK_NAME)
    if lock is None:
        return 0
    logger = logging.getLogger("foreshock_recorder")
    log = logging.handlers.RotatingFileHandler(folder / "recorder.log", maxBytes=_LOG_BYTES, backupCount=1)
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    collector = options.collector or f"127.0.0.1:{DEFAULT_GRPC_PORT}"
    try:
        lost = asyncio.run(_run(folder, collector, options.linger))
    except Exception:
        logger.exception("the recorder failed")
        return 1
    if lost:
        logger.warning("%d records could not be sent to %s", lost, collector)
    else:
        _tidy(folder)
    os.close(lock)
    return 0


async def _run(folder: Path, collector: str, linger: float) -> int:
    from foreshock_recorder.stream import Recorder

    recorder = Recorder(folder, collector=collector, linger=linger)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, recorder.stop)
    return await recorder.run()


def _lock(path: Path) -> int | None:
    """The exclusive lock, or None: ranks probe it for a moment with a shared one, so try for a second."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for _ in range(20):
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        time.sleep(0.05)
    os.close(descriptor)
    return None


def _tidy(folder: Path) -> None:
    """Leave nothing behind, unless another rank has come meanwhile."""
    if not any(folder.glob("*.ring")):
        for path in folder.glob("recorder.*"):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


if __name__ == "__main__":
    sys.exit(main())
