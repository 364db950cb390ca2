"""The `foreshock` command: finds the subcommand among those that installed parts have registered."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

from foreshock._version import __version__

_GROUP = "foreshock.commands"
_PURPOSE = {
    "collector": "take records in, detect, diagnose, export Prometheus series",
    "status": "what the runs are doing",
    "incidents": "what went wrong, newest first",
    "diagnose": "what happened in a recorded training log",
    "report": "a run or a recorded log as one self-contained page",
    "recorder": "hand in what jobs on this machine have left while their collector was away",
    "demo": "watch a real training job blow up, and read why",
}
_USAGE = """usage: foreshock COMMAND [OPTIONS]

Know that a training run is about to die, why, and which rank and layer did it.

commands:
{commands}
  foreshock COMMAND --help says more; foreshock --version"""


def main() -> int:
    """Run a subcommand; 2 for a bad call."""
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
        sys.stderr.write(f"foreshock: there is no command {name!r}; foreshock --help lists them\n")
        return 2
    try:
        # Commands import what is theirs alone when they run.
        return int(next(iter(found)).load()(rest))
    except ModuleNotFoundError as error:
        extra = "of the extra `collector`: in a checkout, pip install '.[collector]'"
        sys.stderr.write(f"foreshock {name}: {error.name} is missing, {extra}\n")
        return 2
