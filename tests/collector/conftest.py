"""What holds in every test of the collector."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def errors_expected(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A swallowed error fails the test, unless that is what it is about: it then has a fixture of this name."""
    yield
    records = [record for when in ("setup", "call") for record in caplog.get_records(when)]
    errors = [r for r in records if r.name.startswith("foreshock_collector") and r.levelno >= logging.ERROR]
    assert not errors, [record.getMessage() for record in errors]
