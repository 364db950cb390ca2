"""Faults one after the other under load; `make chaos` has a thousand of all kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos.__main__ import run
from benchmarks.chaos.fleet import come_back
from benchmarks.chaos.job import DATABASE_FAULTS

FAULTS = (
    "collector killed",
    "recorder killed",
    "ranks stopped for a second",
    "ranks killed, job started again",
    "data swallowed, then cut",
    "answers swallowed, then cut",
    "batches repeated and exchanged",
    "clock a day ahead, then right",
    "clock a day behind, then right",
    "damaged ring beside the others",
    "header of a ring overwritten",
    "slots of a ring overwritten",
)


def _figures(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return what was printed, by its words."""
    return dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[-1:].isdigit())


def test_faults_under_load_lose_nothing_and_double_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, FAULTS, faults=len(FAULTS), seed=0, pace=0.01) == []
    figures = _figures(capsys)
    assert {
        figures[what]
        for what in (
            "lost",
            "doubled",
            "counter regressions",
            "stalls reported",
            "rings and other files left",
            "processes left",
        )
    } == {"0"}
    assert int(figures["steps sent"]) > 100


def test_databases_that_are_destroyed_under_load_cost_nothing_that_rings_still_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, [*DATABASE_FAULTS], faults=len(DATABASE_FAULTS), seed=0, pace=0.01) == []
    figures = _figures(capsys)
    assert figures["stored"] == figures["steps sent"]
    assert figures["lost"] == figures["records counted as dropped"] == "0"
    assert len(list(tmp_path.glob("collector/foreshock.db.damaged-?"))) == len(DATABASE_FAULTS)


def test_many_recorders_that_come_back_at_once_lose_nothing(tmp_path: Path) -> None:
    assert come_back(tmp_path, recorders=60) == []
