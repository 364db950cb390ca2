"""The mirror copies records of a ring into experiment tools, and nothing that a tool does reaches training."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foreshock._attach.settings import MIRROR_TOOLS, settings_from
from foreshock._errors import SettingsError
from foreshock._log import _logged
from foreshock._mirror import mirror as mirror_module
from foreshock._mirror import mlflow, tensorboard, trackio, wandb
from foreshock._mirror.mirror import FINDS, Mirror
from foreshock_recorder.layout import GRADIENT_UNKNOWN, RingFile
from foreshock_recorder.reader import RingReader
from foreshock_recorder.records import ReadOutcome, Record, read_record
from foreshock_recorder.ring import Ring
from tests.support.rings import make_ring, measure, step


class Tool:
    """A tool that remembers what it was given."""

    def __init__(self) -> None:
        self.closed = False
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.notices: list[str] = []
        self.pages: list[str] = []
        self.flushed = 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, values))

    def notify(self, text: str) -> None:
        self.notices.append(text)

    def link(self, page: str) -> None:
        self.pages.append(page)

    def flush(self) -> None:
        self.flushed += 1

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.rows]


class Broken(Tool):
    """A tool whose disk is full."""

    def write(self, *_: object) -> None:
        raise OSError("no space left")


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    return make_ring(tmp_path)


@pytest.fixture(autouse=True)
def _says_everything_anew() -> None:
    _logged.clear()


def mirrored(monkeypatch: pytest.MonkeyPatch, *tools: Tool | None) -> Mirror:
    names = list(FINDS)[: len(tools)]
    finds = {name: (lambda tool=tool: tool) for name, tool in zip(names, tools, strict=True)}
    monkeypatch.setattr(mirror_module, "FINDS", finds)
    return Mirror(names)


def test_each_look_writes_the_step_with_the_largest_norm_since_the_last_one(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = Tool()
    mirror = mirrored(monkeypatch, tool)
    for sequence, norm in enumerate([1.0, 9.0, 2.0], 1):
        step(ring, sequence, global_norm=norm, clip_coefficient=0.5, loss=0.25)
    mirror.update(ring, 10.0)
    assert tool.rows == [
        (
            102,
            {
                "foreshock/learning_rate": 0.5,
                "foreshock/loss": 0.25,
                "foreshock/gradient_norm": 9.0,
                "foreshock/clip_coefficient": 0.5,
            },
        )
    ]
    mirror.update(ring, 20.0)
    assert len(tool.rows) == 1, "there was no new step"
    # What is not finite counts as the largest; of equals, the newest is written.
    for sequence, norm in enumerate([math.inf, math.nan, 5.0], 4):
        step(ring, sequence, global_norm=norm)
    mirror.update(ring, 30.0)
    step(ring, 7, global_norm=1.0)
    step(ring, 8, global_norm=1.0)
    mirror.update(ring, 40.0)
    step(ring, 9, global_norm=1.0, loss=math.nan)
    step(ring, 10, global_norm=7.0)
    mirror.update(ring, 50.0)
    assert tool.steps == [102, 105, 108, 109]


def test_it_looks_at_most_once_a_second_and_a_last_time_when_the_rank_leaves(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = Tool()
    mirror = mirrored(monkeypatch, tool)
    for sequence, now in enumerate([5.0, 5.5, 5.99, 6.0, 6.9], 1):
        step(ring, sequence, global_norm=1.0)
        mirror.update(ring, now)
    assert (tool.steps, tool.flushed) == ([101, 104], 0)
    mirror.close(ring)
    assert (tool.steps, tool.flushed) == ([101, 104, 105], 1)


def test_of_a_fast_run_a_look_reads_a_bounded_number_of_records(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def reading(ring: RingFile, sequence: int) -> Record | ReadOutcome:
        read.append(sequence)
        return read_record(ring, sequence)

    monkeypatch.setattr(mirror_module, "read_record", reading)
    mirror = mirrored(monkeypatch, Tool())
    for sequence in range(1, 301):
        step(ring, sequence)
    mirror.update(ring, 1.0)
    assert read == list(range(201, 301))


def test_a_step_whose_gradient_is_unknown_has_no_norm(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = Tool()
    mirror = mirrored(monkeypatch, tool)
    ring.begin_step(1, step=7, wall=0.0, monotonic=0.0, learning_rate=0.5, flags=GRADIENT_UNKNOWN)
    measure(ring, 1)
    mirror.update(ring, 1.0)
    assert tool.rows == [(7, {"foreshock/learning_rate": 0.5})]
    # Nor does it hide one that has.
    ring.begin_step(2, step=8, wall=0.0, monotonic=0.0, learning_rate=0.5, flags=GRADIENT_UNKNOWN)
    measure(ring, 2, global_norm=math.nan)
    step(ring, 3, global_norm=4.0)
    mirror.update(ring, 2.0)
    assert tool.steps == [7, 103]


def test_page_and_notice_are_written_when_they_change(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = Tool()
    mirror = mirrored(monkeypatch, tool)
    mirror.update(ring, 1.0)
    recorder = RingReader(ring.path)
    recorder.write_page("http://monitor:9327/run/a")
    mirror.update(ring, 2.0)
    for notice in ("Build-up", "Exploding gradients"):
        recorder.write_notice(notice)
        mirror.update(ring, 3.0 + len(notice))
        mirror.update(ring, 100.0 + len(notice))
    assert tool.pages == ["http://monitor:9327/run/a"]
    assert tool.notices == ["Build-up", "Exploding gradients"]


def test_a_tool_that_fails_costs_one_line_and_is_left_alone_and_others_go_on(
    ring: Ring, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, other = Broken(), Tool()
    mirror = mirrored(monkeypatch, broken, other)
    with caplog.at_level(logging.INFO, "foreshock"):
        for sequence in range(1, 4):
            step(ring, sequence)
            mirror.update(ring, 2.0 * sequence)
        mirror.close(ring)
    assert other.steps == [101, 102, 103]
    assert [record.getMessage() for record in caplog.records] == [
        "tensorboard is no longer mirrored: OSError: no space left"
    ]
    assert broken.flushed == 0 and other.flushed == 1


def test_a_run_that_is_opened_later_is_found_and_one_that_is_closed_is_replaced(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Tool(), Tool()
    opened: list[Tool | None] = [None]
    monkeypatch.setattr(mirror_module, "FINDS", {"wandb": lambda: opened[0]})
    mirror = Mirror(["wandb"])
    RingReader(ring.path).write_page("http://monitor:9327/run/a")
    mirror.update(ring, 1.0)
    opened[0] = first
    step(ring, 1)
    mirror.update(ring, 2.0)
    first.closed, opened[0] = True, second
    step(ring, 2)
    mirror.update(ring, 3.0)
    assert (first.steps, second.steps) == ([101], [102])
    assert first.pages == second.pages == ["http://monitor:9327/run/a"]


def test_the_search_for_a_run_becomes_rare_and_says_so_once(
    ring: Ring, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    searches = []
    now = 0.0
    monkeypatch.setattr(mirror_module, "FINDS", {"wandb": lambda: searches.append(now)})
    mirror = Mirror(["wandb"])
    with caplog.at_level(logging.INFO, "foreshock"):
        for now in map(float, range(400)):
            mirror.update(ring, now)
    assert searches == [0, 1, 3, 7, 15, 31, 63, 127, 191, 255, 319, 383]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["wandb has no open run on rank 0, so it is not mirrored yet"]


def test_the_tools_of_the_setting_are_those_that_can_be_found() -> None:
    assert tuple(FINDS) == MIRROR_TOOLS
    assert settings_from({"FORESHOCK_MIRROR": " WandB, tensorboard,wandb,"}).mirror == ("wandb", "tensorboard")
    assert settings_from({}).mirror == ()
    with pytest.raises(
        SettingsError, match="FORESHOCK_MIRROR: 'neptune' is none of tensorboard, wandb, mlflow, trackio"
    ):
        settings_from({"FORESHOCK_MIRROR": "tensorboard,neptune"})


@pytest.mark.parametrize(("name", "find"), [("wandb", wandb.find), ("mlflow", mlflow.find), ("trackio", trackio.find)])
def test_a_tool_that_the_script_has_not_imported_is_not_imported(
    name: str, find: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert find() is None
    assert name not in sys.modules


class FakeWandbRun:
    """Has what `wandb.sdk.wandb_run.Run` has."""

    def __init__(self) -> None:
        self._local_step = 0
        self.calls: list[Any] = []
        self.summary: dict[str, str] = {}
        self.config = SimpleNamespace(update=lambda values, **options: self.calls.append((values, options)))

    def define_metric(self, name: str, **options: Any) -> None:
        self.calls.append((name, options))

    def log(self, values: dict[str, float], **options: Any) -> None:
        self.calls.append((values, options))


def test_in_wandb_values_join_the_scripts_next_row_so_that_its_steps_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = SimpleNamespace(run=None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert wandb.find() is None
    module.run = opened = FakeWandbRun()
    run = wandb.find()
    assert run is not None
    assert [run.closed] == [False]
    run.write(7, {"foreshock/loss": 0.5})
    run.notify("Exploding gradients")
    run.link("http://monitor:9327/run/a")
    assert opened.calls == [
        ("foreshock/step", {"hidden": True}),
        ("foreshock/*", {"step_metric": "foreshock/step"}),
        ({"foreshock/step": 7, "foreshock/loss": 0.5}, {"commit": False}),
        ({"foreshock/page": "http://monitor:9327/run/a"}, {"allow_val_change": True}),
    ]
    assert opened.summary == {"foreshock/notice": "Exploding gradients"}
    module.run = None
    assert [run.closed] == [True]


def test_in_wandb_the_largest_step_since_the_scripts_last_row_is_in_its_next(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = FakeWandbRun()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=opened))
    run = wandb.find()
    assert run is not None
    for row, norm in ((3, 1.0), (3, math.nan), (3, math.inf), (3, 9.0), (4, 2.0), (4, 5.0), (4, 4.0)):
        opened._local_step = row
        run.write(7, {"foreshock/gradient_norm": norm})
    written = [values["foreshock/gradient_norm"] for values, options in opened.calls if "commit" in options]
    assert str(written) == "[1.0, nan, 2.0, 5.0]"


def test_in_mlflow_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    active = [SimpleNamespace(info=SimpleNamespace(run_id="a"))]
    module = SimpleNamespace(
        active_run=lambda: active[-1] if active else None,
        log_metrics=lambda values, **options: calls.append((values, options)),
        set_tag=lambda name, text, **options: calls.append((name, text, options)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    run = mlflow.find()
    assert run is not None
    assert [run.closed] == [False]
    run.write(7, {"foreshock/loss": 0.5})
    run.notify("Exploding gradients")
    run.link("http://monitor:9327/run/a")
    assert calls == [
        ({"foreshock/loss": 0.5}, {"step": 7, "run_id": "a", "synchronous": False}),
        ("foreshock/notice", "Exploding gradients", {"synchronous": False}),
        ("foreshock/page", "http://monitor:9327/run/a", {"synchronous": False}),
    ]
    active.clear()
    assert [run.closed, mlflow.find()] == [True, None]


def test_in_trackio_values_have_no_step_so_that_the_scripts_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    opened = SimpleNamespace(log_system=lambda values: calls.append(values), alert=lambda *given: calls.append(given))
    current: list[Any] = [opened]
    context = SimpleNamespace(current_run=SimpleNamespace(get=lambda: current[0]))
    module = SimpleNamespace(context_vars=context, AlertLevel=SimpleNamespace(INFO="info"))
    monkeypatch.setitem(sys.modules, "trackio", module)
    run = trackio.find()
    assert run is not None
    assert [run.closed] == [False]
    run.write(7, {"foreshock/loss": 0.5})
    run.notify("Exploding gradients")
    run.link("http://monitor:9327/run/a")
    assert calls == [
        {"foreshock/step": 7, "foreshock/loss": 0.5},
        ("Foreshock", "Exploding gradients"),
        ("Foreshock", "http://monitor:9327/run/a", "info"),
    ]
    current[0] = None
    assert [run.closed, trackio.find()] == [True, None]


def test_an_open_summary_writer_is_found_and_a_closed_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class SummaryWriter:
        """Has what torch's writer has, before and after `close`."""

        def __init__(self) -> None:
            self.file_writer: object | None = object()

    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard.writer", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboardX.writer", SimpleNamespace(SummaryWriter=SummaryWriter))
    assert tensorboard.find() is None
    writer = SummaryWriter()
    found = tensorboard.find()
    assert found is not None
    assert [found.closed] == [False]
    writer.file_writer = None
    assert [found.closed, tensorboard.find()] == [True, None]
