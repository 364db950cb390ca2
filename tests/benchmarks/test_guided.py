"""What guided fuzzing gives bytes to: it reads its own examples, and an error that nobody expects comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fuzz import guided
from benchmarks.fuzz.guided import TARGETS
from benchmarks.fuzz.live import unmuffled


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_reads_its_examples_whole_cut_and_damaged(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    seeds = list(target.seeds(tmp_path))
    assert seeds
    with unmuffled():
        for data in seeds:
            for damaged in (data, data[: len(data) // 2], data[::-1], b""):
                target.read(damaged, tmp_path)


@pytest.mark.parametrize(("name", "read"), [("log", "read_log"), ("settings", "config_from"), ("ring", "serve")])
def test_an_error_that_nobody_expects_comes_out(
    name: str, read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(guided, read, fail)
    with pytest.raises(ZeroDivisionError):
        TARGETS[name].read(b"x", tmp_path)


def test_an_error_in_the_collector_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("foreshock_collector.state.runs.Run.ingest", fail)
    (whole, *_) = TARGETS["wire"].seeds(tmp_path)
    with unmuffled(), pytest.raises(AssertionError, match="ZeroDivisionError"):
        TARGETS["wire"].read(whole, tmp_path)
