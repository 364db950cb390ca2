"""The `foreshock` command: runs a subcommand registered by an installed package."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

from foreshock._version import __version__

_GROUP = "foreshock.commands"
_PURPOSE = {
    "collector": "receive records, detect and diagnose failures, export Prometheus series",
    "status": "show what the runs are doing",
    "incidents": "show what went wrong, newest first",
    "diagnose": "diagnose a recorded training log",
    "report": "write a run or a recorded log as one self-contained page",
    "backup": "copy a collector's database while it is in use",
    "notify": "send a test notification",
    "files": "print or copy the rules, dashboards, runbooks and service files that are installed",
    "recorder": "deliver records that jobs left on this machine while the collector was down",
    "run": "run a training command and watch it, without a change to its script",
    "doctor": "check a machine that trains, or the collector's",
    "demo": "run a real training job that explodes, and see why",
}
_USAGE = """usage: foreshock COMMAND [OPTIONS]

Warns before a training run dies, and names the cause, the rank and the layer.

commands:
{commands}
  foreshock COMMAND --help shows the options of a command; foreshock --version the version"""


def main() -> int:
    """Run a subcommand. Return 2 if there is no such command."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        sys.stdout.write(f"foreshock {__version__}\n")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "".join(f"  {name:<12}{purpose}\n" for name, purpose in _PURPOSE.items())
        sys.stdout.write(_USAGE.format(commands=lines) + "\n")
        return 0 if arguments else 2
    name, *rest = arguments
    found = entry_points(group=_GROUP, name=name)
    if not found:
        sys.stderr.write(f"foreshock: no command {name!r}; foreshock --help lists all commands\n")
        return 2
    try:
        # Commands import their own modules only when they run.
        return int(next(iter(found)).load()(rest))
    except ModuleNotFoundError as error:
        extra = "of the extra `collector`: in a checkout, pip install '.[collector]'"
        sys.stderr.write(f"foreshock {name}: {error.name} is missing; it is part {extra}\n")
        return 2
