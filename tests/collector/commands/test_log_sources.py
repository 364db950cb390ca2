"""Logs come through pipes, in any encoding, torn and repeated."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from foreshock_collector.commands.cli import diagnose
from foreshock_collector.commands.logs import LogError, json_rows, read_log, source
from foreshock_collector.commands.logs.columns import ColumnBuilder
from foreshock_collector.commands.logs.source import opened
from foreshock_collector.commands.replay import replay
from tests.support.logs import csv, explosion, healthy

SAMPLES = Path(__file__).parent / "samples"
TEXT = "step,loss,grad_norm\n0,2.0,1.0\n1,nan,1.5\n"


def losses(path: Path, data: bytes | str) -> list[float | None]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return [row.loss for row in read_log(path).rows()]


def test_a_pipe_and_a_fifo_give_what_the_file_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = csv(tmp_path, [*healthy(9_000), *((9_000 + i, loss, norm) for i, loss, norm in explosion())])
    data = path.read_bytes()
    assert len(data) > 5 * 65_536
    code = diagnose([str(path)])
    expected = capsys.readouterr().out.replace(str(path), "LOG")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert diagnose(["-"]) == code == 1
    assert capsys.readouterr().out.replace("-:", "LOG:", 1) == expected
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(data,))
    writer.start()
    assert diagnose([str(fifo)]) == code
    writer.join()
    assert capsys.readouterr().out.replace(str(fifo), "LOG") == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_encodings_and_line_breaks_are_recognized(encoding: str, line_break: str, tmp_path: Path) -> None:
    text = TEXT.replace("\n", line_break)
    assert str(losses(tmp_path / "log", text.encode(encoding))) == "[2.0, nan]"
    assert str(losses(tmp_path / "log.gz", gzip.compress(text.encode(encoding)))) == "[2.0, nan]"


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace(",", ";"),
        TEXT.replace(",", "\t"),
        TEXT.replace(",", " "),
        TEXT.replace(",", " , "),
        "# " + TEXT,
        "\n\n" + TEXT,
        TEXT.replace("2.0", '"2.0"'),
        TEXT.replace(",", ";").replace("2.0", "2,0"),
        TEXT + "2",
        TEXT + "step,loss,grad_norm\n",
        TEXT.replace("nan", "NaN"),
        TEXT + "1,nan,1.5\n",
    ],
)
def test_tables_are_read_however_they_are_written(text: str, tmp_path: Path) -> None:
    assert str(losses(tmp_path / "log", text)) == "[2.0, nan]"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize(
    "line",
    [
        "5,1.5,2.5",
        "5,,2.5",
        "5,1.5,None",
        '5,"1.5",2.5',
        "5,1.5",
        "5,1e999,-inf",
        "5,nan,2.5",
        "\n\n",
        "5, 1.5 ,2.5",
        "5,1_5,2",
    ],
)
def test_a_table_is_read_alike_in_blocks_of_any_size(
    line: str, delimiter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that hold nothing but numbers are read another way than others."""
    rows = [f"{step},{1 / (step + 3)},{step / 7}" for step in range(5)]
    text = "\n".join(["step,loss,grad_norm", *rows, line, *(row.replace(",", "9,", 1) for row in rows), "6,1"])
    path = tmp_path / "log"
    path.write_text(text.replace(",", delimiter))
    whole = read_log(path)
    for characters in (1, 50, 200):
        monkeypatch.setattr(source, "_BLOCK_CHARACTERS", characters)
        assert repr(read_log(path).rows()) == repr(whole.rows())
        assert read_log(path).unread_lines == whole.unread_lines


@pytest.mark.parametrize("missing", ["", "None", "N/A", "null", "-", " "])
def test_a_value_that_was_not_logged_is_not_nan(missing: str, tmp_path: Path) -> None:
    assert losses(tmp_path / "log", f"step,loss,grad_norm\n0,2.0,1.0\n1,{missing},1.5\n") == [2.0, None]


def test_columns_may_change_where_a_header_comes_again(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("step,loss\n0,2.0\n1,1.9\nstep,grad_norm,loss\n2,0.5,1.8\n")
    assert [(row.step, row.loss, row.norm) for row in read_log(log).rows()] == [
        (0, 2, None),
        (1, 1.9, None),
        (2, 1.8, 0.5),
    ]


def test_torn_and_foreign_lines_of_json_are_left_out_and_counted(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [
        '{"step": 0, "loss": 2.0}',
        '{"step": 1, "lo',
        "Traceback (most recent call last):",
        '{"step": 1, "loss": 1.5}',
    ]
    log.write_text("\n".join([*lines, '{"step": 2, "loss"']))
    found = read_log(log)
    assert [row.loss for row in found.rows()] == [2.0, 1.5]
    assert found.unread_lines == 2


@pytest.mark.parametrize(
    ("line", "alike"),
    [
        ('{"grad_norm": 2.5, "loss": 1, "step": 5, "time": "noon"}', 13),
        ('{"step": 5, "loss": 1.5, "grad_norm": 2.5, "time": null}', 13),
        ('{"step": 5, "loss": 1.5, "grad_norm": 2.5}', 0),
        ('{"step": 5, "loss": 1.5, "grad_norm": 2.5, "time": "", "lr": 0.1}', 0),
        ('{"step": 5, "loss": null, "grad_norm": 2.5, "time": ""}', 0),
        ('{"step": 5, "loss": "1.5", "grad_norm": 2.5, "time": ""}', 0),
        ('{"step": 5, "loss": NaN, "grad_norm": 1e999, "time": ""}', 0),
        ('{"step": 4, "eval_loss": 9.5}', 0),
        ('{"step": 5, "lo', 0),
        ("[5]", 0),
        ("", 12),
    ],
)
def test_lines_like_the_first_are_read_as_all_others_are(
    line: str, alike: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines with the keys of the first and numbers in the same places are read a faster way."""
    rows = [json.dumps({"step": i, "loss": 2 + 1 / (i + 1), "grad_norm": i, "time": str(i)}) for i in range(12)]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join([*rows[:6], line, *rows[6:]]) + "\n")
    found = read_log(path)
    with opened(path) as log:
        chunks = list(json_rows.read_json(log, ColumnBuilder(str(path), {})))
    fast = sum(len(chunk) for chunk in chunks if isinstance(chunk, json_rows.AlikeRows))
    assert fast == alike
    monkeypatch.setattr(json_rows, "_layout_of", lambda _: None)
    other = read_log(path)
    assert repr(found.rows()) == repr(other.rows())
    assert (found.unread_lines, found.empty_rows) == (other.unread_lines, other.empty_rows)


def test_a_torn_last_line_of_text_is_left_out(tmp_path: Path) -> None:
    assert losses(tmp_path / "log", "iter 0: loss 3.0, lr 0.1\niter 1: loss 2.9, lr 0.1\niter 2: loss 2") == [3.0, 2.9]
    assert losses(tmp_path / "log", "iter 0: loss 3.0, lr 0.1\niter 1: loss 2.9, lr 0.1") == [3.0, 2.9]


def test_rows_that_every_rank_prints_count_once(tmp_path: Path) -> None:
    lines = "".join(f"step {i} loss {2 - 0.1 * i:.1f}\n" * 4 for i in range(5))
    assert losses(tmp_path / "log", lines) == [2.0, 1.9, 1.8, 1.7, 1.6]


def test_a_resume_repeats_steps_and_hides_nothing(tmp_path: Path) -> None:
    log = explosion()
    resumed = [*log, *((step, loss, norm) for step, loss, norm in healthy(300) if step >= 100)]
    found = replay(read_log(csv(tmp_path, resumed)))
    assert (found.verdict.cause, found.first_nonfinite) == ("exploding_gradients", 126)
    calm = [*healthy(120), *healthy(220)[100:]]
    assert replay(read_log(csv(tmp_path, calm))).verdict.cause == "healthy"


def test_very_long_lines_cost_nothing(tmp_path: Path) -> None:
    settings = "config " + "word " * 100_000
    assert losses(tmp_path / "log", f"{settings}\nstep 1 loss 2.5\n{settings}\nstep 2 loss 2.4\n") == [2.5, 2.4]
    dump = '{"config": "' + "x" * 500_000 + '"}\n'
    assert losses(tmp_path / "log", dump + '{"step": 1, "loss": 2.5}\n') == [2.5]


def test_values_that_stop_are_no_health(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = "step,loss,grad_norm\n" + "".join(f"{i},2.0,1.0\n" for i in range(100))
    lines = "".join(f'{{"step": {i}, "loss": 2.0}}\n' for i in range(100))
    for text, silent in (
        (table, "".join(f"{i},,\n" for i in range(100, 160))),
        (lines, "".join(f'{{"step": {i}, "loss": null}}\n' for i in range(100, 160))),
    ):
        log = tmp_path / "log"
        log.write_text(text + silent)
        assert diagnose([str(log)]) == 1
        assert "Neither loss nor gradient norm since step 100" in capsys.readouterr().out
    # Evaluations at the end are rows of another kind.
    log.write_text(lines + "".join(f'{{"step": {i}, "test_accuracy": 0.5}}\n' for i in range(100, 160)))
    assert diagnose([str(log)]) == 0


def test_a_log_of_epochs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.txt"
    log.write_text("".join(f'{{"train_loss": {0.6 if i < 60 else "NaN"}, "epoch": {i}}}\n' for i in range(61)))
    assert diagnose([str(log)]) == 1
    printed = capsys.readouterr().out
    assert "61 rows, one per epoch, unknown" in printed
    assert "epoch 60" in printed
    assert "step 60" not in printed.replace("steps", "")


def test_an_exploding_run_among_others_is_found_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, log in (("a", healthy()), ("b", explosion())):
        (tmp_path / name).mkdir()
        csv(tmp_path / name, log).rename(tmp_path / name / "metrics.csv")
    assert diagnose([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"{tmp_path}/a/metrics.csv: 120 rows, healthy" in printed
    assert f"{tmp_path}/b/metrics.csv: 128 rows, exploding_gradients" in printed
    (tmp_path / "empty").mkdir()
    assert diagnose([str(tmp_path / "empty")]) == 2
    assert "no log in this folder" in capsys.readouterr().err


def damaged(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    for _ in range(rng.randrange(1, 8)):
        first = rng.randrange(len(data) + 1)
        last = first + rng.randrange(60)
        other = rng.choice(others)
        pieces = [
            b"",
            data[first:last] * 3,
            other[: last - first],
            rng.randbytes(1),
            b"1e999",
            b"\n",
            b'"',
            b"{",
            b"\0",
            b"nan",
        ]
        data = data[:first] + rng.choice(pieces) + data[last:]
    return data


def test_a_damaged_log_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    rng, read, refused = random.Random(0), 0, list[str]()
    samples = [path.read_bytes() for path in sorted(SAMPLES.iterdir())]
    for number in range(40 * len(samples)):
        path = tmp_path / "log"
        path.write_bytes(damaged(samples[number % len(samples)], samples, rng))
        try:
            found = replay(read_log(path))
        except LogError as error:
            refused.append(str(error))
        else:
            read += 1
            assert len(found.log) > 0
    assert read > 100
    assert len(refused) > 100
    assert [error for error in refused if not error.startswith(str(tmp_path)) or "\n" in error] == []
