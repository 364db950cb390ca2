"""The command `foreshock run`: starts a launcher or a script with the start-up hook in its environment."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

STARTUP = Path(__file__).parent / "startup"
"""Folder of the `sitecustomize` that each Python process of the job runs at its start."""
EMBEDDED = "foreshock_collector.commands.embedded"
_VARIABLES = ("clip", "collector", "experiment", "run")
_SWITCHES = {"skip": "1", "dry_run": "1", "local_norms": "0"}


def main(arguments: Sequence[str]) -> int:
    """Become the command, with its exit code. Return 2 for a wrong option, 127 if the command cannot be started."""
    options = parsed(arguments)
    command = options.command
    if not command:
        sys.stderr.write("foreshock run: give the command after --, as in: foreshock run -- torchrun train.py\n")
        return 2
    if options.embedded and options.collector is not None:
        sys.stderr.write("foreshock run: --embedded starts a collector of its own; leave out --collector\n")
        return 2
    environment = environment_of(options, os.environ)
    if options.embedded:
        # In its own process, since this package knows nothing of the collector.
        command = [sys.executable, "-m", EMBEDDED, *command]
    try:
        os.execvpe(command[0], command, environment)  # noqa: S606
    except OSError as error:
        sys.stderr.write(f"foreshock run: cannot start {command[0]}: {error.strerror}\n")
        return 127


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options, with `command` as it is to be started. Exits with 2 for a wrong option."""
    options = _parser().parse_args(arguments)
    if options.command[:1] == ["--"]:
        del options.command[0]
    return options


def environment_of(options: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the job: the options as variables, and the start-up hook on the path."""
    result = dict(environment)
    for name in _VARIABLES:
        if (value := getattr(options, name)) is not None:
            result[f"FORESHOCK_{name.upper()}"] = value
    for name, value in _SWITCHES.items():
        if getattr(options, name):
            result[f"FORESHOCK_{name.upper()}"] = value
    path = result.get("PYTHONPATH")
    result["PYTHONPATH"] = os.pathsep.join([str(STARTUP), path] if path else [str(STARTUP)])
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="foreshock run",
        usage="foreshock run [OPTIONS] -- COMMAND...",
        description="Run a training command and watch each model at its optimizer's first step. The script needs no "
        "change; one that calls foreshock.attach wins. FORESHOCK_DISABLED=1 turns it off.",
        allow_abbrev=False,
    )
    parser.add_argument("--clip", metavar="CLIP", help="a maximum norm, 'adaptive' or 'adaptive 1.0'; default: observe")
    parser.add_argument("--skip", action="store_true", help="skip steps that would corrupt the weights")
    parser.add_argument("--dry-run", action="store_true", help="count what would be clipped or skipped, and do neither")
    parser.add_argument(
        "--no-local-norms", dest="local_norms", action="store_true", help="measure no rank's own gradient"
    )
    parser.add_argument("--collector", metavar="ADDRESS", help="host:port of the collector's gRPC service")
    parser.add_argument(
        "--embedded", action="store_true", help="start a collector for this job alone, and write a report at its end"
    )
    parser.add_argument("--experiment", metavar="NAME", help="experiment that the run belongs to")
    parser.add_argument("--run", metavar="NAME", help="name of the run")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="what starts the training")
    return parser
