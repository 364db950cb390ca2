"""`foreshock diagnose`: every format says the same of the same training."""

from __future__ import annotations

import io
import json
import math
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foreshock_collector.commands import terminal
from foreshock_collector.commands.cli import diagnose
from foreshock_collector.commands.log_follower import LogFollower
from foreshock_collector.commands.logs import Row
from foreshock_collector.commands.replay import replay, replay_file
from foreshock_collector.server import Server
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.logs import Log, csv, explosion, healthy
from tests.support.streams import Stream, config, hello, serving, steps


def json_lines(folder: Path, log: Log) -> Path:
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": loss, "grad_norm": norm}) + "\n" for s, loss, norm in log))
    return path


def trainer_state(folder: Path, log: Log) -> Path:
    """With its default filter, which prints 0.0 for a loss of NaN, and an evaluation between the steps."""
    history: list[dict[str, Any]] = [
        {"step": s, "loss": 0.0 if math.isnan(loss) else loss, "grad_norm": norm, "learning_rate": 0.1}
        for s, loss, norm in log
    ]
    history.insert(50, {"step": 50, "eval_loss": 2.0, "eval_runtime": 1.0})
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"log_history": history, "global_step": len(log)}, indent=2))
    return path


def tensorboard(folder: Path, log: Log) -> Path:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder / "logs"))
    for step, loss, norm in log:
        values = [
            Summary.Value(tag=tag, simple_value=v) for tag, v in (("train/loss", loss), ("train/grad_norm", norm))
        ]
        writer.add_event(Event(step=step, wall_time=float(step), summary=Summary(value=values)))
    writer.close()
    return folder / "logs"


def database(folder: Path, log: Log) -> Path:
    async def record() -> None:
        async with Server(config(folder)) as server:
            stream = Stream(server)
            losses = [loss for _, loss, _ in log]
            flags = [pb.LOSS_OBSERVED] * len(log)
            await stream.send(hello(), steps(1, [norm for _, _, norm in log], loss=losses, flags=flags))
            await stream.stored(len(log))
            await stream.close()

    serving(record())
    return folder / "db"


FORMATS = [csv, json_lines, trainer_state, tensorboard, database]


def told(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = diagnose([str(path), "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    answer: dict[str, Any] = json.loads(line)
    return code, answer


@pytest.mark.parametrize("write", FORMATS)
def test_an_explosion_is_found_in_every_format(
    write: Callable[[Path, Log], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, explosion())
    code, answer = told(path, capsys)
    assert code == 1
    assert (answer["file"], answer["rows"]) == (str(path), 128)
    verdict = answer["verdict"]
    assert (verdict["cause"], verdict["first_nonfinite_row"]) == ("exploding_gradients", 126)
    assert 0 < verdict["lead_rows"] <= 6
    assert verdict["try"]
    build_up = next(event for event in answer["events"] if event["kind"] == "build_up")
    assert 120 < build_up["row"] == build_up["step"] < 126


@pytest.mark.parametrize("write", FORMATS)
def test_a_healthy_log_is_left_alone_in_every_format(
    write: Callable[[Path, Log], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer = told(write(tmp_path, healthy()), capsys)
    assert code == 0
    assert answer["verdict"]["cause"] == "healthy"
    assert answer["verdict"]["first_nonfinite_row"] is answer["verdict"]["lead_rows"] is None
    assert answer["events"] == []


def test_an_empty_cell_is_not_logged_and_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sparse.csv"
    path.write_text("step,loss,grad_norm\n" + "".join(f"{i},{2.0 if i % 10 == 0 else ''},1.0\n" for i in range(100)))
    code, answer = told(path, capsys)
    assert (code, answer["rows"], answer["verdict"]["cause"]) == (0, 100, "healthy")


def test_people_read_what_happened_and_what_to_try(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnose([str(csv(tmp_path, explosion()))]) == 1
    text = capsys.readouterr().out
    assert "exploding_gradients" in text
    assert "step 126" in text
    assert "try:" in text


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("missing.csv", None, "No such file"),
        ("empty.csv", "", "neither a loss nor a gradient norm"),
        ("other.csv", "a,b\n1,2\n", "found a, b; name the columns with --columns step=...,loss=...,norm=...,lr=..."),
        ("word.csv", "step,loss\n1,high\n", "data row 0: loss is 'high', not a number"),
        ("header.csv", "step,loss\n", "no rows"),
        ("other.jsonl", '{"perplexity": 1.0, "step": 1}\n', "found perplexity, step; name the columns with --columns"),
        ("state.json", '{"log_history": 3}', "log_history is not a list"),
        ("bytes.csv", b"\xff\xfe\x00", "bytes.csv"),
    ],
)
def test_what_cannot_be_read_gets_one_line_and_exit_code_2(
    name: str, text: str | bytes | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert diagnose([str(path), "--json"]) == 2
    answer = capsys.readouterr()
    assert answer.out == ""
    assert answer.err.count("\n") == 1
    assert says in answer.err


def test_one_bad_file_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = csv(tmp_path, explosion())
    assert diagnose([str(tmp_path / "none.csv"), str(good), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["verdict"]["cause"] == "exploding_gradients"


def rows(*log: tuple[float | None, float | None], step: int = 1, rate: float | None = None) -> list[Row]:
    """Of (loss, norm)."""
    return [Row(step=step * i, loss=loss, norm=norm, rate=rate) for i, (loss, norm) in enumerate(log)]


CALM = [(loss, norm) for _, loss, norm in healthy(60)]
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("log", "cause", "first"),
    [
        ([*CALM, (1.5, INF), *CALM], "amp_overflow", 60),
        ([(1.5, INF), (1.5, NAN), *CALM], "amp_overflow", 0),
        # From 2^32 a scaler takes sixteen steps to 2^16.
        ([*[(2.3, INF)] * 16, *CALM], "amp_overflow", 0),
        ([*CALM, (1.5, INF), *CALM, (1.5, INF)], "amp_overflow", 60),
        ([(2.3, NAN)] * 40, "first_step_nonfinite", 0),
        ([(1.5, INF), *CALM, (1.5, 5.0), (1.5, 50.0), (1.5, 900.0), (NAN, NAN)], "exploding_gradients", 64),
        ([*CALM, *[(1.5, INF)] * 12], "amp_scale_collapse", 60),
        ([*CALM, (1.5, NAN)], "nonfinite_gradient", 60),
        ([*CALM, (1.5, NAN), (NAN, NAN)], "nonfinite_gradient", 60),
        ([*CALM, *[(1.5 + 0.1 * i, 1.0) for i in range(300)]], "loss_divergence", None),
        ([*CALM, *[(1.5 + 0.1 * i, 1.0) for i in range(300)], (INF, INF)], "nonfinite_divergence", 360),
        ([*CALM, *[(1.5, 1e-7)] * 200], "vanishing_gradients", None),
        ([*[(2.0, None)] * 60, (9.0, None), (40.0, None), (NAN, None)], "nonfinite_divergence", 62),
        ([*[(2.0, None)] * 60, (NAN, None)], "sudden_nonfinite", 60),
    ],
)
def test_a_log_alone_tells_these_apart(
    log: list[tuple[float | None, float | None]], cause: str, first: int | None
) -> None:
    found = replay(rows(*log))
    assert (found.verdict.cause, found.first_nonfinite) == (cause, first)


def test_a_change_of_the_interval_begins_a_new_series() -> None:
    """Every step, and then every 500: what changed in between is no spike."""
    rare = [(0.3, 12.0 + 0.1 * i) for i in range(40)]
    close = rows(*CALM)
    far = [Row(step=559 + 500 * i, loss=loss, norm=norm, rate=None) for i, (loss, norm) in enumerate(rare)]
    assert replay([*close, *far]).events == ()
    assert [event.kind for event in replay([*close, *rows(*rare)]).events] != []


def test_a_rule_may_be_set_and_a_wrong_one_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = csv(tmp_path, explosion())
    surge = [
        "--set",
        "gradient.surge_steps=1000",
        "--set",
        "gradient.steep_rise=700",
        "--set",
        "gradient.lasting_limit=1e9",
    ]
    assert diagnose([str(path), "--json", *surge]) == 1
    assert "build_up" not in capsys.readouterr().out
    for wrong in ("spike=1", "gradient.spike_z", "gradient.spike_z=high"):
        assert diagnose([str(path), "--set", wrong]) == 2
        assert wrong.split("=")[0] in capsys.readouterr().err


class Screen(io.StringIO):
    """Standard error on a terminal, or in a pipe; says when something is written."""

    def __init__(self, *, tty: bool) -> None:
        super().__init__()
        self.tty = tty
        self.written = threading.Event()

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> int:
        self.written.set()
        return super().write(text)


def test_long_work_says_on_a_terminal_how_far_it_is_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(tty=True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(terminal, "_PATIENCE_SECONDS", 0.0)
    with terminal.working(lambda: "log.csv: row 7 of 9"):
        assert screen.written.wait(30)
    assert screen.getvalue().startswith("\r\x1b[Klog.csv: row 7 of 9")
    assert screen.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize(("tty", "patience"), [(True, 60.0), (False, 0.0)])
def test_short_work_and_work_in_a_pipe_say_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tty: bool, patience: float
) -> None:
    screen = Screen(tty=tty)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(terminal, "_PATIENCE_SECONDS", patience)
    assert replay_file(csv(tmp_path, explosion())).verdict.cause == "exploding_gradients"
    assert screen.getvalue() == ""


def test_progress_reaches_the_last_row() -> None:
    seen: list[int] = []
    replay(rows(*[(2.0, 1.0)] * 400), at=seen.append)
    assert seen == sorted(set(seen))
    assert seen[-1] == 400


def eventful(count: int) -> list[Row]:
    """Calm parts of all lengths, between spikes, build-ups, NaN, planned changes, a drift of the loss, and gaps."""
    rng, found, rate, level, step = random.Random(1), list[Row](), 0.1, 2.0, 0
    while len(found) < count:
        kind = rng.choice(["spike", "climb", "nan", "rate", "drift", "no norm", "no loss", "gap", "fade"])
        for _ in range(rng.randrange(5, 400)):
            level *= 1.002 if kind == "drift" else 1.0
            norm = math.exp(rng.gauss(-30 if kind == "fade" else 0, 0.1))
            loss = level + 0.01 * rng.random()
            found.append(
                Row(
                    step=(step := step + 1),
                    loss=None if kind == "no loss" else loss,
                    norm=None if kind == "no norm" else norm,
                    rate=rate,
                )
            )
        step += 300 if kind == "gap" else 0
        rate *= 10 ** rng.choice([-1, 1]) if kind == "rate" else 1
        level = 2.0
        tail = {"spike": [50.0], "climb": [3.0**i for i in range(8)], "nan": [math.nan] * 3}.get(kind, [])
        found += [Row(step=(step := step + 1), loss=2.0, norm=norm, rate=rate) for norm in tail]
    return found


def test_calm_blocks_are_judged_as_their_rows_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    log = eventful(12_000)
    in_blocks = replay(log)
    monkeypatch.setattr(LogFollower, "_scan_calm", lambda _, first, __: first)
    one_by_one = replay(log)
    assert len(one_by_one.events) > 20
    assert len({event.kind for event in one_by_one.events}) >= 4
    assert [e.sequence for e in in_blocks.events] == [e.sequence for e in one_by_one.events]
    for mine, other in zip(in_blocks.events, one_by_one.events, strict=True):
        assert mine.kind == other.kind
        assert mine.score == pytest.approx(other.score, rel=1e-9)
    assert in_blocks.verdict.summary == one_by_one.verdict.summary


def test_calm_blocks_carry_a_lasting_fault_to_its_row() -> None:
    """A fault that begins after thousands of calm rows begins where it would if each were processed alone."""
    for log in (
        [(2.0, 1.0)] * 5000 + [(2.0, 1e-7)] * 300,
        [(2.0, 1.0)] * 5000 + [(2 + 0.01 * i, 1.0) for i in range(999)],
    ):
        found = replay(rows(*log))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LogFollower, "_scan_calm", lambda _, first, __: first)
            other = replay(rows(*log))
        assert found.verdict.cause in ("vanishing_gradients", "loss_divergence")
        assert found.verdict == other.verdict


@pytest.mark.parametrize(
    ("rows_", "apart", "cause"), [(24, 1, "unknown"), (25, 1, "healthy"), (200, 49, "healthy"), (200, 50, "unknown")]
)
def test_a_log_that_is_too_short_or_too_sparse_shows_no_trouble_and_is_not_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows_: int, apart: int, cause: str
) -> None:
    path = csv(tmp_path, [(apart * step, loss, norm) for step, loss, norm in healthy(rows_)])
    assert diagnose([str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["verdict"]
    assert (found["cause"], found["confidence"]) == (cause, 1.0 if cause == "healthy" else 0.3)


def test_a_healthy_log_of_norms_after_clipping_is_said_to_be_one() -> None:
    norms = [0.7, 1.0, 1.0, 0.9] * 50
    assert replay(rows(*((2.0, norm) for norm in norms))).verdict.evidence == (
        "the norms were logged after clipping, at 1: they cannot show a climb",
    )
    assert replay(rows(*((2.0, norm * (1 + 0.01 * (i % 7))) for i, norm in enumerate(norms)))).verdict.evidence == ()
