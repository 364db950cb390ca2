"""`foreshock files`: what a wheel ships is found, and copied whole."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from foreshock_collector.commands.files import main
from foreshock_collector.resources import SOURCES, resource
from tests.support.repository import ROOT


def test_the_wheel_holds_what_the_command_lists() -> None:
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert hatch["force-include"] == {source: f"foreshock_collector/data/{name}" for name, source in SOURCES.items()}
    for name in SOURCES:
        # wheel-check and the command read files of these folders, and none below them.
        assert resource(name) == ROOT / SOURCES[name]
        assert all(path.is_file() for path in resource(name).iterdir())


def test_without_an_option_every_file_is_printed_and_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert all(path.is_file() for path in printed)
    for name in ("foreshock.rules.yml", "run.json", "ForeshockRunDied.md", "foreshock-collector.service"):
        assert name in {path.name for path in printed}


def test_a_copy_is_whole_replaces_an_older_one_and_keeps_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older, other = tmp_path / "dashboards/run.json", tmp_path / "dashboards/mine.json"
    older.parent.mkdir()
    older.write_text("old")
    other.write_text("mine")
    assert main(["--copy", str(tmp_path)]) == 0
    printed = {Path(line) for line in capsys.readouterr().out.splitlines()}
    assert printed == {path for path in tmp_path.rglob("*") if path.is_file()} - {other}
    assert all(path.read_bytes() == (ROOT / SOURCES[path.parent.name] / path.name).read_bytes() for path in printed)
    assert other.read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["--copy", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
