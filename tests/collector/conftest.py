"""What holds in every test of the collector."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def errors_expected(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A swallowed error fails the test, unless that is what it is about: it then has a fixture of this name."""
    yield
    told = [
        r for when in ("setup", "call") for r in caplog.get_records(when) if r.name.startswith("foreshock_collector")
    ]
    assert not told, [record.getMessage() for record in told]
