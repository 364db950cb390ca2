"""A webhook and real programs for as long as a test lasts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.alerting import Start, Webhook, listening, programs


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with listening() as heard:
        yield heard


@pytest.fixture
def start() -> Iterator[Start]:
    with programs() as starting:
        yield starting
