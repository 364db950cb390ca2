"""The database."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from foreshock_collector.state.database_file import StoreError
from foreshock_collector.state.store import Store
from tests.support.job_in_memory import Job


def test_a_foreign_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(b"not a database, but long enough to be looked at as if it were one" * 20)
    with pytest.raises(StoreError, match="cannot be used"):
        Store(path)


def test_a_step_of_a_run_takes_less_than_100_bytes_however_many_ranks_make_it(tmp_path: Path) -> None:
    job = Job(ranks=4)
    with closing(Store(tmp_path / "db")) as store:
        for _ in range(20):
            for rank in range(4):
                norms = [1.0 + 0.001 * i + rank for i in range(100)]
                seconds = [1.7e9 + 0.1 * (job.sent[rank] + i) for i in range(100)]
                job.tell(rank, norms, wall_seconds=seconds, learning_rate=[3e-4] * 100, loss_scale=[1.0] * 100)
            job.settle(10.0)
            store.commit(job.runs)
        stored = store.steps("r", attempt=0, after=0, limit=3000)
        assert stored["sequence"] == list(range(1, 2001))
        assert stored["clip_coefficient"] == stored["loss_scale"] == [1.0] * 2000
        assert stored["learning_rate"] == [3e-4] * 2000
        (size,) = store._db.execute("SELECT sum(pgsize) FROM dbstat WHERE name='steps'").fetchone()
        assert size / 2000 < 100
