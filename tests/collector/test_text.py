"""Names and texts from outside: cleaned and shortened, never refused, and unable to break a line or a terminal."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from foreshock_collector.ingest.intake import Intake
from foreshock_collector.ingest.session import Session
from foreshock_collector.log_format import LineLimit, TextFormatter
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.store import Store
from foreshock_collector.text import NAME_LENGTH, identifier
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.clock import Clock
from tests.support.streams import hello, steps

ODD = ("a\nb", "a\u00a0b", "\u200d", "\x1b[2J\x1b]0;pwned\x07", "\u202egnp.exe", "<script>", "n" * 500, "\x00")


@pytest.mark.parametrize("name", ODD)
def test_an_odd_or_long_name_costs_no_run_its_monitoring(tmp_path: Path, name: str) -> None:
    store, session = Store(tmp_path / "db"), Session()
    intake = Intake(runs := Runs(), store, Clock(), ended_seconds=900.0, silent=900.0)
    model = pb.ModelSummary(
        type=name, module_types={name: 1}, layers=[name * 10], parameters=[name * 10], parameter_sizes=[1],
        parameter_layers=[0],
    )  # fmt: skip
    place = pb.Topology(world_size=1, node=name)
    odd: dict[str, Any] = {
        "run": name,
        "experiment": name,
        "launch_id": name,
        "clip": name,
        "topology": place,
        "model": model,
    }
    intake.apply(hello(**odd, instance="i"), session)
    intake.apply(steps(1, [1.0], instance="i"), session)
    # Said again on a new stream, it is the same run.
    session.open = False
    intake.apply(hello(**odd, instance="i"), again := Session())
    intake.commit()
    (position,) = intake.positions(session)
    assert (position.sequence, position.refused, again.refused) == (1, "", {})
    (run,) = runs
    shown = [run.name, run.experiment, *run.newest.model.layers, *run.newest.model.module_types, run.newest.hello.clip]
    assert all(text.isprintable() and text for text in shown)
    assert len(run.name) <= NAME_LENGTH
    store.close()


def test_names_that_differ_stay_different() -> None:
    names = [*ODD, *(f"{name}x" for name in ODD), "a\\nb", "n" * 501]
    assert len({identifier(name) for name in names}) == len(names)
    assert identifier("crimson-otter") == "crimson-otter"


def test_no_name_breaks_or_colors_a_line_of_the_log() -> None:
    record = logging.LogRecord(
        "foreshock_collector", logging.INFO, "", 1, "run %(run)s", ({"run": ODD[3] + "\n"},), None
    )
    line = TextFormatter().format(record)
    assert line.isprintable() and r"\x1b[2J" in line


def test_no_text_of_an_error_looks_like_another_line_of_the_log_or_colors_one() -> None:
    try:
        raise ValueError("\x1b[2J\n2026-01-01T00:00:00.000Z INFO all is well\u2028\x85more")
    except ValueError:
        told = sys.exc_info()
    first, *rest = (
        TextFormatter().format(logging.LogRecord("x", logging.ERROR, "", 1, "failed", None, told)).split("\n")
    )
    assert first.endswith("ERROR failed") and len(rest) >= 5
    assert all(line.isprintable() and line.startswith("  ") for line in rest)


def test_a_flood_of_one_kind_of_line_is_cut_off_and_others_are_not() -> None:
    def record(line: int, second: float) -> logging.LogRecord:
        found = logging.LogRecord("foreshock_collector", logging.WARNING, "service.py", line, "refused", None, None)
        found.created = second
        return found

    limit = LineLimit()
    flood = [record(1, i / 100) for i in range(1000)]
    logged = [each for each in flood if limit.filter(each)]
    assert len(logged) == 100
    assert logged[-1].getMessage() == "refused (further lines of this kind are left out for a minute)"
    assert logged[0].getMessage() == "refused"
    assert limit.filter(record(2, 10.0))
    assert limit.filter(record(1, 61.0))
