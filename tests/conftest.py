"""What all tests need of the process that they run in."""

from __future__ import annotations

import signal

from tests.support.forked_jobs import forking

# A suite that a script has started in the background ignores Ctrl-C, and so would every process of a test.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish() -> None:
    if forking.cache_info().currsize:
        forking().stop()
