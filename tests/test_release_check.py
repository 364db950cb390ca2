"""`make release-check` passes a tree whose parts agree on the version, and names each part that does not."""

from __future__ import annotations

import importlib.util
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]


def load() -> Any:
    spec = importlib.util.spec_from_file_location("release_check", ROOT / ".ci/release_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release_check = load()
FILES = {
    "agent/foreshock/_version.py": '"""The version, once."""\n\n__version__ = "1.2.0"\n',
    "CHANGELOG.md": "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2027-01-31\n\n- New.\n\n## [1.1.0] - 2026-12-01\n",
    "README.md": "# Foreshock\n\nInstall foreshock-1.2.0-py3-none-any.whl\n",
    "docs/deploy.md": "`pip install foreshock==1.2.0`\n",
    "docs/release-notes/1.2.0.md": "# Foreshock 1.2.0\n",
    "docs/release-notes/1.1.0.md": "# Foreshock 1.1.0\n\nforeshock==1.1.0\n",
}
Change = Callable[[Path], object]


def git(tree: Path, *arguments: str) -> None:
    subprocess.run(
        ("git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments),
        cwd=tree, check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "1.2.0")
    return tmp_path


def write(name: str, text: str) -> Change:
    return lambda tree: (tree / name).write_text(text)


def problems(tree: Path) -> list[str]:
    return [*release_check.text_problems(tree), *release_check.git_problems(tree)]


def test_a_tree_whose_parts_agree_has_no_problem_before_and_after_its_tag(tree: Path) -> None:
    assert problems(tree) == []
    git(tree, "tag", "v1.2.0")
    assert problems(tree) == []


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (write("agent/foreshock/_version.py", '__version__ = "1.3.0.dev0"\n'), "not the version of a release"),
        (write("CHANGELOG.md", "## [Unreleased]\n\n- More.\n\n## [1.2.0] - 2027-01-31\n"), "under [Unreleased]"),
        (write("CHANGELOG.md", "## [1.2.0]\n"), "expected [1.2.0] - YEAR-MONTH-DAY"),
        (write("CHANGELOG.md", "## [1.1.0] - 2026-12-01\n"), "expected [1.2.0]"),
        (lambda tree: (tree / "docs/release-notes/1.2.0.md").unlink(), "docs/release-notes/1.2.0.md is missing"),
        (write("docs/release-notes/1.2.0.md", "# Foreshock 1.1.0\n"), "the title is not"),
        (write("docs/deploy.md", "pip install foreshock==1.1.0\n"), "docs/deploy.md: names version 1.1.0"),
        (write("README.md", "foreshock-1.1.9-py3-none-any.whl\n"), "README.md: names version 1.1.9"),
    ],
)
def test_what_does_not_fit_the_version_is_named(tree: Path, change: Change, names: str) -> None:
    change(tree)
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "changed")
    assert any(names in problem for problem in problems(tree))


def test_a_tag_on_another_commit_and_a_change_that_is_not_committed_are_named(tree: Path) -> None:
    git(tree, "tag", "v1.2.0")
    git(tree, "commit", "-qm", "later", "--allow-empty")
    (tree / "README.md").write_text("changed")
    assert list(release_check.git_problems(tree)) == [
        "the working tree has changes that are not committed",
        "v1.2.0 is already the tag of another commit: raise the version",
    ]


@pytest.mark.parametrize(("inside", "wrong"), [("1.2.0", 0), ("1.1.0", 2)])
def test_a_wheel_is_held_against_the_version_by_metadata_and_module(tmp_path: Path, inside: str, wrong: int) -> None:
    wheel = tmp_path / "foreshock-1.2.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("foreshock-1.2.0.dist-info/METADATA", f"Metadata-Version: 2.4\nVersion: {inside}\n")
        archive.writestr("foreshock/_version.py", f'__version__ = "{inside}"\n')
    assert len(list(release_check.wheel_problems(wheel, "1.2.0"))) == wrong
