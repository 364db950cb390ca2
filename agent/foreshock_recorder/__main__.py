"""`python -m foreshock_recorder`: started by the first rank that needs it, or by hand as a side-car."""

from __future__ import annotations

import argparse
import asyncio
import logging
import logging.handlers
import math
import os
import signal
import sys
import time
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from foreshock_recorder.address import address_of
from foreshock_recorder.folder import LOG_NAME, lock, release
from foreshock_recorder.orphans import give_up
from foreshock_recorder.paths import has_recorder, run_folder

logger = logging.getLogger("foreshock_recorder")

_LOG_BYTES = 256 * 1024
_EPILOG = """
A rank starts its recorder by itself, with --folder. To run one as a side-car, give --run: it then waits for the first
rank, and leaves after the last. It must share the ranks' ring folder and user; if it shares their process ids as well
(a pod's shareProcessNamespace), it can report how a rank was killed.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Run until the last rank has exited. Exit code 0: done, or another recorder serves it; 1: failed, see its log."""
    options = _options(arguments)
    side_car = options.run is not None
    folder: Path = run_folder(options.run, options.ring_dir) if side_car else options.folder
    try:
        held = None if has_recorder(folder) else lock(folder)
    except OSError as error:
        sys.stderr.write(f"foreshock_recorder: {folder} cannot be used: {error}\n")
        return 1
    if held is None:
        return 0
    try:
        _log_to(folder / LOG_NAME)
    except OSError as error:
        sys.stderr.write(f"foreshock_recorder: {folder} cannot be used: {error}\n")
        return 1
    logger.info("serving %s, delivering to %s", folder, options.collector)
    base = folder.parent if side_car else folder.parent.parent
    try:
        _limit_orphans(base)
        left = asyncio.run(_run(folder, held, options))
        _limit_orphans(base)
    except Exception:
        logger.exception("the recorder failed")
        return 1
    if left:
        logger.warning("%d records did not reach %s; a later recorder delivers them", left, options.collector)
    if side_car:
        release(folder, held)
    return 0


def _limit_orphans(base: Path) -> None:
    try:
        for line in give_up(base, now=time.time()):
            logger.info("%s", line)
    except Exception:
        # The recorder's own ranks come first.
        logger.exception("cannot enforce the limits on orphans")


async def _run(folder: Path, held: int, options: argparse.Namespace) -> int:
    # What gRPC logs also comes as an error, and is in our log. gRPC reads this when it is loaded, which takes a while:
    # only once we know that no other recorder is running.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from foreshock_recorder.recorder import Recorder

    recorder = Recorder(folder, held, collector=options.collector, linger=options.linger, run=options.run or "")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, recorder.stop)
    return await recorder.run()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="foreshock_recorder", description="Deliver ranks' records to a collector.", epilog=_EPILOG)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--folder", type=Path, help="folder of a launch's rings")
    which.add_argument("--run", help="name of the run; its launches are found as the ranks find them")
    parser.add_argument("--ring-dir", default="", metavar="DIR", help="with --run: FORESHOCK_RING_DIR of the ranks")
    parser.add_argument(
        "--collector", type=_address, default="", metavar="HOST:PORT", help="default: this machine, default port"
    )
    parser.add_argument(
        "--linger",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long to keep trying after the last rank; default: 30",
    )
    options = parser.parse_args(arguments)
    if options.run == "":
        parser.error("argument --run: must not be empty")
    if options.ring_dir and options.run is None:
        parser.error("argument --ring-dir: requires --run")
    return options


def _address(text: str) -> str:
    try:
        return address_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


class _LogFile(logging.handlers.RotatingFileHandler):
    """Opens a file of this user only, and never the one that a link points to."""

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        return os.fdopen(descriptor, "a", encoding=self.encoding, errors=self.errors)


def _log_to(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    handler = _LogFile(path, maxBytes=_LOG_BYTES, backupCount=1)
    logging.basicConfig(
        handlers=[handler], level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


if __name__ == "__main__":
    sys.exit(main())
