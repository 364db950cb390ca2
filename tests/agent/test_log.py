"""The logger `foreshock`: lines are seen unless the script says otherwise, and none of them disturbs it."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from foreshock import _log

pytestmark = pytest.mark.integration

SPEAK = """
from foreshock import _log
_log.info("run night: http://monitor:9327/run/night")
_log.warn_once("problem", "the collector does not take records")
_log.warn_once("problem", "the collector does not take records")
print("training continues")
"""
LINES = ["foreshock: run night: http://monitor:9327/run/night", "foreshock: the collector does not take records"]


def script(before: str, after: str = "") -> subprocess.CompletedProcess[str]:
    """Run a script that configures logging in some way, then gets two lines of ours, one of them twice."""
    done = subprocess.run(
        [sys.executable, "-c", before + SPEAK + after], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "training continues\n"), done.stderr
    return done


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log, "_logged", set())
    monkeypatch.setattr(_log, "_rank", None)


def test_a_script_that_has_not_configured_logging_sees_every_line() -> None:
    assert script("").stderr.splitlines() == LINES


def test_a_script_that_has_configured_logging_gets_each_line_once_in_its_own_format() -> None:
    configured = "import logging; logging.basicConfig(format='%(levelname)s %(name)s %(message)s')"
    assert script(configured).stderr.splitlines() == [
        "INFO foreshock run night: http://monitor:9327/run/night",
        "WARNING foreshock the collector does not take records",
    ]


def test_a_script_may_configure_logging_after_the_first_line() -> None:
    later = "import logging; logging.basicConfig(format='%(message)s'); _log.info('later')"
    assert script("", later).stderr.splitlines() == [*LINES, "later"]


@pytest.mark.parametrize(
    ("silence", "left"),
    [
        ("logging.getLogger('foreshock').setLevel(logging.WARNING)", LINES[1:]),
        ("logging.getLogger('foreshock').setLevel(logging.ERROR)", []),
        ("logging.getLogger('foreshock').addHandler(logging.NullHandler())", []),
        ("logging.getLogger('foreshock').disabled = True", []),
        ("logging.getLogger('foreshock').addFilter(lambda record: 'run' not in record.getMessage())", LINES[1:]),
        ("logging.disable()", []),
    ],
)
def test_a_script_silences_lines_by_the_means_of_logging(silence: str, left: list[str]) -> None:
    assert script(f"import logging; {silence}").stderr.splitlines() == left


@pytest.mark.parametrize("configured", ["", "import logging; logging.basicConfig()\n"])
@pytest.mark.parametrize(
    "broken",
    [
        "sys.stderr = None",
        "sys.stderr.close()",
        "sys.stderr = open('/dev/full', 'w')",
        "os.close(2)",
    ],
)
def test_a_standard_error_that_takes_nothing_costs_the_script_nothing(configured: str, broken: str) -> None:
    # Not through the interpreter's end, which fails by itself on such a standard error.
    script(f"import os, sys\n{configured}{broken}", "sys.stdout.flush(); os._exit(0)")


def test_a_handler_that_raises_costs_the_script_nothing() -> None:
    raising = """
import logging
class Raising(logging.Handler):
    def emit(self, record):
        raise RuntimeError("a bug of the script's")
logging.getLogger().addHandler(Raising())
"""
    assert script(raising).stderr == ""


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("rank", "lines"), [(0, ["alike", "own"]), (1, ["own"])])
def test_what_all_ranks_see_alike_is_logged_by_rank_0(
    caplog: pytest.LogCaptureFixture, rank: int, lines: list[str]
) -> None:
    _log.set_rank(rank)
    for _ in range(2):
        _log.rank_zero_warn_once("alike", "alike")
        _log.warn_once("own", "own")
    assert caplog.record_tuples == [("foreshock", logging.WARNING, line) for line in lines]


@pytest.mark.usefixtures("fresh")
def test_a_process_that_is_rank_0_of_any_of_its_groups_logs_what_all_ranks_see(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for rank in (3, 0, 2):
        _log.set_rank(rank)
    _log.rank_zero_info_once("alike", "alike")
    assert caplog.messages == ["alike"]


def test_nothing_else_of_the_probe_writes_to_standard_error() -> None:
    sources = Path(_log.__file__).parent.glob("_*.py")
    writing = {path.name for path in sources if "sys.stderr" in path.read_text()}
    assert writing == {"_log.py", "_cli.py"}
