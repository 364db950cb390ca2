"""The fast tests with the oldest and the newest dependencies that pyproject.toml allows.

Run by `make test-matrix`: the oldest on the oldest Python, since old packages have no builds for newer ones, and the
newest on every Python that PATH has. Each cell is a virtual environment in .matrix/. The bounds are read from
pyproject.toml, so a lower bound that no longer passes shows here. torch is taken as requirements-dev.txt pins it, since
newer releases bring gigabytes of CUDA.
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
TESTS = ("-m", "not integration or trainers")
"""What a cell runs unless told otherwise: the tests that start no process, and those of the callbacks for trainers."""


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
    """Every Python on PATH that the project supports, oldest first."""
    for minor in range(11, 30):
        name = f"python3.{minor}"
        if shutil.which(name) is None:
            continue
        asked = subprocess.run((name, "-c", "import sys; print(sys.executable)"), capture_output=True, text=True)
        if asked.returncode:  # a version manager's stand-in for one that is not installed
            sys.stdout.write(f"skipped: {name} does not run\n")
        else:
            yield asked.stdout.strip()


def dependencies() -> list[Requirement]:
    """What users of the package, with all extras, get installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for text in (*project["dependencies"], *(each for extra in extras for each in extra))]


def pins() -> dict[str, str]:
    """Name to version, as the files of requirements have them."""
    files = ("requirements-dev.txt", "requirements-trainers.txt")
    text = "\n".join((ROOT / file).read_text() for file in files)
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    pins = [Requirement(line) for line in lines if line]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


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
    # hatchling asks for editables when it builds an editable install.
    wanted_here = [each for each in map(Requirement, groups) if each.marker is None or each.marker.evaluate()]
    names = (*(each.name for each in wanted_here), "editables")
    return [f"{name}=={pins()[name]}" for name in map(canonicalize_name, names)]


def run(cell: Cell, tests: Sequence[str]) -> bool:
    """Make the cell's environment anew and run the tests in it."""
    folder = ENVIRONMENTS / cell.name
    python = str(folder / "bin/python")
    subprocess.run((cell.python, "-m", "venv", "--clear", str(folder)), check=True)
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--upgrade")
    steps = (
        (*pip, *wanted(cell.dependencies), *tools()),
        (*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)),
        (python, "-m", "pytest", "-q", *tests),
    )
    return all(subprocess.run(step, cwd=ROOT, check=False).returncode == 0 for step in steps)


def main() -> int:
    """Run the cells one after another; print a line for each. Returns 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=f"Other arguments go to pytest; without any: {' '.join(TESTS)}"
    )
    parser.add_argument("--only", choices=("oldest", "newest"), help="run one set of dependencies")
    options, tests = parser.parse_known_args()
    supported = list(pythons())
    cells = [Cell(supported[0], "oldest"), *(Cell(python, "newest") for python in supported)]
    cells = [cell for cell in cells if options.only in (None, cell.dependencies)]
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
