"""Databases with random damage: the collector starts with what can be read, or says in a line why it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.state import recovery
from foreshock_collector.state.database_file import StoreError
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.store import Store
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.clock import Clock
from tests.support.fuzzing import bounded
from tests.support.streams import hello, steps


@pytest.fixture
def errors_expected() -> None:
    """Damage is logged as an error."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of two runs, one of which has ended."""
    path, session = tmp_path_factory.mktemp("whole") / "db", Session()
    store = Store(path)
    intake = Intake(Runs(), store, Clock(), ended_seconds=900.0, silent=900.0)
    for run in ("first", "second"):
        intake.apply(hello(run, launch_id=run), session)
        intake.apply(steps(1, [1.0] * 100, run=run), session)
        intake.commit()
    left = pb.Exit(instance="first-0", reason=pb.ExitReason.FINISHED, last_sequence=100)
    intake.apply(pb.FromRecorder(exit=left), session)
    intake.commit()
    store.close()
    return path


def goes_on(path: Path) -> bool:
    """Start a collector, and have it store a new run. Return whether it did; a damaged database is replaced once."""
    clock = Clock()
    store, runs = recovery.load(str(path), clock())
    try:
        session = Session()
        intake = Intake(runs, store, clock, ended_seconds=900.0, silent=900.0)
        intake.apply(hello("new", launch_id="new"), session)
        intake.apply(steps(1, [1.0] * 5, run="new"), session)
        intake.commit()
        intake.expire()
        error = intake.database_error
        if error is None:
            assert [each.sequence for each in intake.positions(session)] == [5]
            return True
    finally:
        store.close()
    recovery.replace(path, error)
    return False


@bounded(40)
@given(
    damage=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=200)), min_size=1, max_size=4
    ),
    kept=st.one_of(st.just(1.0), st.just(1.0), st.floats(0, 1)),
)
def test_a_collector_starts_whatever_its_database_holds(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[float, bytes]], kept: float
) -> None:
    data = bytearray(whole.read_bytes())
    for place, value in damage:
        start = int(place * len(data))
        data[start : start + len(value)] = value[: len(data) - start]
    path = tmp_path_factory.mktemp("damaged") / "db"
    path.write_bytes(data[: int(kept * len(data))])
    started, why = False, ""
    try:
        started = goes_on(path) or goes_on(path)
    except StoreError as error:
        why = str(error)
    # What may not be a collector's database at all is not touched.
    assert started or str(path) in why
