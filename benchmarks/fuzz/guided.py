"""Fuzzing that is guided by coverage: `make fuzz-guided`, `make fuzz-guided ARGS="--target ring --seconds 60"`.

Bytes from outside go to what reads them: messages on the wire, rings, logs, settings. Each target says which error it
may raise; any other one ends the run, and Atheris writes the bytes to a file.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

from google.protobuf.message import DecodeError

from benchmarks.fuzz.live import Live, unmuffled
from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.commands.logs.columns import LogError
from foreshock_collector.commands.logs.formats import read_log
from foreshock_collector.config import ConfigError, config_from
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.ring_bytes import serve, whole_ring
from tests.support.streams import goodbye, hello, steps

_LENGTH_BYTES = 2
"""Before each message of a conversation, as a number."""


class Target(NamedTuple):
    """What reads bytes, and examples to begin with."""

    read: Callable[[bytes, Path], None]
    """Reads the bytes, with a folder for files. Raises what nobody expects."""
    seeds: Callable[[Path], Iterator[bytes]]


def _wire(data: bytes, _: Path) -> None:
    collector = Live(DEFAULT)
    try:
        while data:
            length, data = int.from_bytes(data[:_LENGTH_BYTES]), data[_LENGTH_BYTES:]
            piece, data = data[:length], data[length:]
            try:
                message = pb.FromRecorder.FromString(piece)
            except DecodeError:
                continue  # the stream ends with INVALID_ARGUMENT
            collector.take(message)
        collector.commit()
        collector.check()
    finally:
        collector.close()


def _conversation(_: Path) -> Iterator[bytes]:
    said = (hello(), steps(1, [1.0, 2.0]), steps(3, [float("nan")]), goodbye(3))
    messages = [message.SerializeToString() for message in said]
    yield b"".join(len(each).to_bytes(_LENGTH_BYTES) + each for each in messages)
    yield from (len(each).to_bytes(_LENGTH_BYTES) + each for each in messages)


def _ring(data: bytes, folder: Path) -> None:
    path = folder / "first-0.ring"
    path.write_bytes(data)
    serve(path)


def _rings(folder: Path) -> Iterator[bytes]:
    yield whole_ring(folder / "run" / "first")


def _log(data: bytes, folder: Path) -> None:
    path = folder / "log"
    path.write_bytes(data)
    with suppress(LogError):
        read_log(path)


def _logs(_: Path) -> Iterator[bytes]:
    yield b"step,loss,grad_norm\n1,0.5,1.0\n2,nan,inf\n"
    yield b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n'
    yield b'{"log_history": [{"step": 1, "loss": 0.5, "grad_norm": 1.0}]}'
    yield b"iter 10: loss 2.3, grad norm 1.0\n[ 20/ 100] | lm loss: 2.3E+00 | grad norm: 1.0 |\n"


def _settings(data: bytes, folder: Path) -> None:
    path = folder / "foreshock.toml"
    path.write_bytes(data)
    with suppress(ConfigError):
        config_from(["--config", str(path)], {}).rules_of("llm-7")


def _files(_: Path) -> Iterator[bytes]:
    yield b'host = "127.0.0.1"\nack_seconds = 0.5\n[runs."llm-*"]\nleast_sigma = 0.2\n'
    yield b'[runs."llm-*".gradient]\nalpha = 0.9\n'


TARGETS = {
    "wire": Target(_wire, _conversation),
    "ring": Target(_ring, _rings),
    "log": Target(_log, _logs),
    "settings": Target(_settings, _files),
}


def _functions() -> Iterator[FunctionType]:
    """Yield the functions and methods of what is fuzzed: those of all modules would take minutes to instrument."""
    for name, module in sys.modules.items():
        if name.startswith(("foreshock_collector.", "foreshock_recorder.")):
            own = [each for each in vars(module).values() if getattr(each, "__module__", "") == name]
            methods = [each for kind in own if isinstance(kind, type) for each in vars(kind).values()]
            yield from {each for each in (*own, *methods) if isinstance(each, FunctionType)}


def _guide(name: str, seconds: int, seed: int) -> None:
    """Fuzz one target, in this process: Atheris ends it."""
    import atheris

    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp())
    corpus = folder / "corpus"
    corpus.mkdir()
    seeds = list(target.seeds(folder))
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)
    for function in _functions():
        function.__code__ = atheris.patch_code(function.__code__, False)
    longest = 2 * max(map(len, seeds))
    flags = [f"-max_total_time={seconds}", f"-max_len={longest}", f"-seed={seed}", "-print_final_stats=1"]
    with unmuffled():
        atheris.Setup([sys.argv[0], *flags, str(corpus)], lambda data: target.read(data, folder))
        atheris.Fuzz()


def main() -> None:
    """Fuzz each target in a process of its own. Ends with 1 if one has failed."""
    parser = argparse.ArgumentParser(prog="make fuzz-guided", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS), help="default: all")
    parser.add_argument("--seconds", type=int, default=300, help="for each target; default: 300")
    parser.add_argument("--seed", type=int, default=0, help="the same examples again; default: others each time")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        _guide(options.target[0], options.seconds, options.seed)
        return
    failed = []
    for name in options.target:
        print(f"{name}: {options.seconds} s", flush=True)
        seed = options.seed or random.randrange(1, 2**31)
        command = [sys.executable, "-m", "benchmarks.fuzz.guided", "--here", "--target", name]
        done = subprocess.run([*command, "--seconds", str(options.seconds), "--seed", str(seed)], check=False)
        failed += [name] if done.returncode else []
    for name in failed:
        print(f"WRONG: {name}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
