"""The tests with the oldest and the newest dependencies that pyproject.toml allows, on every Python of this machine.

Run by `make test-matrix`. Each cell is a virtual environment in .matrix/. The bounds are read from pyproject.toml, so a
lower bound that no longer passes shows here. torch is taken as requirements-dev.txt pins it: builds for other
platforms than this machine's are not what these tests are about.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".matrix"
PINNED = ("torch",)
"""Dependencies that every cell takes as pinned."""
TESTS = ("-m", "unit")
"""What a cell runs unless told otherwise: the fast tests."""


class Cell(NamedTuple):
    """One combination: a Python and a set of dependencies."""

    python: str
    dependencies: str
    """"oldest" or "newest"."""

    @property
    def name(self) -> str:
        """Name the environment and the line of the summary."""
        return f"{Path(self.python).name}-{self.dependencies}"


def pythons() -> Iterator[str]:
    """Every Python on PATH that the project supports, newest last."""
    for minor in range(11, 30):
        if path := shutil.which(f"python3.{minor}"):
            yield path


def dependencies() -> list[Requirement]:
    """What users of the package, with all extras, get installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for text in (*project["dependencies"], *(each for extra in extras for each in extra))]


def pins() -> dict[str, str]:
    """Name to version, as requirements-dev.txt has them."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements-dev.txt").read_text().splitlines())
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def wanted(which: str) -> list[str]:
    """Requirements of a cell: each dependency at its lower bound, or at the newest that its range allows."""
    found = []
    for requirement in dependencies():
        name = canonicalize_name(requirement.name)
        lower = [each.version for each in requirement.specifier if each.operator == ">="]
        if name in PINNED:
            found.append(f"{name}=={pins()[name]}")
        elif which == "oldest":
            assert lower, f"{requirement} has no lower bound"
            found.append(f"{name}=={lower[0]}")
        else:
            found.append(str(requirement))
    return found


def tools() -> list[str]:
    """What the tests themselves need, as pinned for development."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"]
    return [f"{name}=={pins()[name]}" for name in (canonicalize_name(Requirement(text).name) for text in groups)]


def run(cell: Cell, tests: Sequence[str]) -> bool:
    """Make the cell's environment anew and run the tests in it."""
    folder = ENVIRONMENTS / cell.name
    python = str(folder / "bin/python")
    subprocess.run((cell.python, "-m", "venv", "--clear", str(folder)), check=True)
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--upgrade")
    done = subprocess.run((*pip, *wanted(cell.dependencies), *tools()), check=False)
    if done.returncode:
        return False
    subprocess.run((*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)), check=True)
    return subprocess.run((python, "-m", "pytest", "-q", *tests), cwd=ROOT, check=False).returncode == 0


def main() -> int:
    """Run the cells one after another; print a line for each. Returns 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=f"Other arguments go to pytest; without any: {' '.join(TESTS)}"
    )
    parser.add_argument("--only", choices=("oldest", "newest"), help="one set of dependencies")
    options, tests = parser.parse_known_args()
    sets = (options.only,) if options.only else ("oldest", "newest")
    cells = [Cell(python, which) for python in pythons() for which in sets]
    passed = {}
    for number, cell in enumerate(cells, 1):
        sys.stdout.write(f"== {number} of {len(cells)}: {cell.name}: {', '.join(wanted(cell.dependencies))}\n")
        sys.stdout.flush()
        passed[cell] = run(cell, tests or TESTS)
    for cell, good in passed.items():
        sys.stdout.write(f"{cell.name}: {'passed' if good else 'FAILED'}\n")
    return not all(passed.values())


if __name__ == "__main__":
    sys.exit(main())
