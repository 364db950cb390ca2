"""Whether a tree is ready to be released: version, changelog, release notes, tag, wheel and documents say the same.

Run by `make release-check`, which also checks generated files and installs the wheel. docs/releasing.md has the steps.
"""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

_MENTION = re.compile(r"\bforeshock(?:-|==|[ ]v?)(\d+\.\d+\.\d+(?:\.?(?:dev|a|b|rc)\d+)?)")
"""The project's version, as a document or a command names it."""


def version_of(tree: Path) -> str:
    """The version in `agent/foreshock/_version.py`, which is the only place that states it."""
    (version,) = re.findall(r'^__version__ = "(.+)"$', (tree / "agent/foreshock/_version.py").read_text(), re.MULTILINE)
    return str(version)


def text_problems(tree: Path) -> Iterator[str]:
    """What files of the tree say that does not fit its version."""
    version = version_of(tree)
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        yield f"agent/foreshock/_version.py: {version} is not the version of a release (MAJOR.MINOR.PATCH)"
    changelog = (tree / "CHANGELOG.md").read_text("utf-8")
    sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    if sections and sections[0].startswith("[Unreleased]"):
        if sections[0].removeprefix("[Unreleased]").strip():
            yield f"CHANGELOG.md: move what is under [Unreleased] to [{version}], with today's date"
        sections = sections[1:]
    newest = sections[0].partition("\n")[0] if sections else "nothing"
    if not re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", newest):
        yield f"CHANGELOG.md: the newest release is {newest}; expected [{version}] - YEAR-MONTH-DAY"
    notes = tree / f"docs/release-notes/{version}.md"
    if not notes.exists():
        yield f"docs/release-notes/{version}.md is missing"
    elif f"# Foreshock {version}\n" not in notes.read_text("utf-8"):
        yield f"docs/release-notes/{version}.md: the title is not '# Foreshock {version}'"
    older = tree / "docs/release-notes"
    for page in (tree / "README.md", *sorted((tree / "docs").rglob("*.md"))):
        if older in page.parents:
            continue
        for named in sorted(set(_MENTION.findall(page.read_text("utf-8"))) - {version}):
            yield f"{page.relative_to(tree)}: names version {named}, and this is {version}"


def git_problems(tree: Path) -> Iterator[str]:
    """What keeps the commit from being tagged, or from being the one that is tagged."""
    tag = f"v{version_of(tree)}"
    if _git(tree, "status", "--porcelain"):
        yield "the working tree has changes that are not committed"
    tagged = _git(tree, "tag", "--list", tag) and _git(tree, "rev-parse", f"{tag}^{{commit}}")
    if tagged and tagged != _git(tree, "rev-parse", "HEAD"):
        yield f"{tag} is already the tag of another commit: raise the version"


def wheel_problems(wheel: Path, version: str) -> Iterator[str]:
    """What a wheel says that does not fit the version."""
    if not wheel.name.startswith(f"foreshock-{version}-py3-none-any."):
        yield f"the wheel is named {wheel.name}"
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"foreshock-{version}.dist-info/METADATA"))
        inside = archive.read("foreshock/_version.py").decode()
    if metadata["Version"] != version:
        yield f"the wheel's metadata has version {metadata['Version']}"
    if f'__version__ = "{version}"' not in inside:
        yield "the wheel's foreshock/_version.py has another version"


def _git(tree: Path, *arguments: str) -> str:
    return subprocess.run(("git", *arguments), cwd=tree, capture_output=True, text=True, check=True).stdout.strip()


def _built_wheel(tree: Path, folder: Path) -> Path:
    subprocess.run(
        (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(tree)),
        capture_output=True,
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def main() -> int:
    """Print every problem on a line of its own. Returns 1 if there is one."""
    tree = Path(__file__).parents[1]
    version = version_of(tree)
    problems = [*text_problems(tree), *git_problems(tree)]
    with tempfile.TemporaryDirectory() as folder:
        problems += wheel_problems(_built_wheel(tree, Path(folder)), version)
    for problem in problems:
        sys.stderr.write(f"release-check: {problem}\n")
    if not problems:
        sys.stdout.write(f"release-check: {version} is ready; tag it with: git tag -a v{version} -m {version}\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
