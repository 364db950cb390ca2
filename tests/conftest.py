"""For every test: limits by the machine, the order of a parallel run, and which may start processes."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.forked_jobs import forking
from tests.support.waiting import PATIENCE

# Before anything imports Triton: its interpreter runs the kernels on a CPU. Tests on a card set it to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A suite that a script has started in the background ignores Ctrl-C, and so would every process of a test.
signal.signal(signal.SIGINT, signal.default_int_handler)

STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn"}
"""Audit events of a process that starts another."""
_unit_test = ""
"""The test that runs and may start none."""


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if _unit_test and event in STARTS:
        raise RuntimeError(f"{_unit_test} starts a process: mark it with pytest.mark.integration")


sys.addaudithook(_refuse)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("timeout") is None:
        config.option.timeout = float(config.getini("timeout")) * PATIENCE


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long tests go first and short ones fill the gaps, so that workers end together.

    The longest of all are those with a Prometheus, and in a row so that it ends early: see end_to_end/conftest.py.
    """
    for item in items:
        if item.path.parent.name == "end_to_end":
            item.add_marker(pytest.mark.integration)
        if not _is_long(item):
            item.add_marker(pytest.mark.unit)
    if "gpu" not in (config.option.markexpr or ""):
        on_card = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item not in on_card]
        config.hook.pytest_deselected(items=on_card)
    items.sort(key=lambda item: (_is_long(item), "watch" in getattr(item, "fixturenames", ())), reverse=True)


def _is_long(item: pytest.Item) -> bool:
    return any(map(item.get_closest_marker, ("integration", "exhaustive")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file is one worker's, for its fixtures' sake; each test of end_to_end goes where there is room."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if "end_to_end/" in file else file

    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _unit_test
    _unit_test = "" if item.get_closest_marker("integration") else item.nodeid
    try:
        return (yield)
    finally:
        _unit_test = ""


def pytest_collection_finish() -> None:
    """What has been imported is no garbage: a full collection would take a fifth of a second to see so."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    # Hypothesis, which may be imported only now, asks the garbage collector who refers to an object.
    gc.unfreeze()
    if forking.cache_info().currsize:
        forking().stop()
