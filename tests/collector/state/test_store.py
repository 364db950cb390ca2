"""The database."""

from __future__ import annotations

from pathlib import Path

import pytest

from foreshock_collector.state.database_file import StoreError
from foreshock_collector.state.store import Store


def test_a_foreign_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(b"not a database, but long enough to be looked at as if it were one" * 20)
    with pytest.raises(StoreError, match="cannot be used"):
        Store(path)
