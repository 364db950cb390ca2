"""`foreshock files`: where the rules, dashboards, runbooks and service files of the installed release are."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from foreshock_collector.config import ConfigError, Parser
from foreshock_collector.resources import SOURCES, resource


def main(arguments: list[str]) -> int:
    """Print or copy the files. Return 2 if that failed."""
    parser = Parser(
        prog="foreshock files",
        description="Print the paths of the rules, dashboards, runbooks and service files that are installed.",
        epilog="Exit code 2: a wrong option, or a file that cannot be copied.",
    )
    parser.add_argument(
        "--copy", type=Path, metavar="DIR", help="copy them to a folder, and replace those of an older release there"
    )
    try:
        options = parser.parse_args(arguments)
        paths = installed() if options.copy is None else copy(options.copy)
    except (ConfigError, OSError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    sys.stdout.write("".join(f"{path}\n" for path in paths))
    return 0


def installed() -> list[Path]:
    """Return the path of every file that is installed, sorted within its folder."""
    return [path for name in SOURCES for path in sorted(resource(name).iterdir()) if path.is_file()]


def copy(folder: Path) -> list[Path]:
    """Copy every file to DIR/NAME/FILE. Return the paths of the copies. Raises `OSError`.

    Files that the folder has beside them stay.
    """
    copies = []
    for name in SOURCES:
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(resource(name).iterdir()):
            if path.is_file():
                copies.append(Path(shutil.copyfile(path, target / path.name)))
                shutil.copymode(path, target / path.name)
    return copies
