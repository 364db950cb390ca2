"""Logs as each tool writes them: what is read of each."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from foreshock_collector.commands.logs import LogError, Row, find_logs, parse_columns, read_log

NAN, INF = float("nan"), float("inf")
SAMPLES = Path(__file__).parent / "samples"
"""A log of each tool, made by hand after what the tool writes."""


def read(folder: Path, name: str, text: str) -> list[Row]:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return read_log(path).rows()


def row(step: float, loss: float | None, norm: float | None = None, rate: float | None = None) -> Row:
    return Row(step=float(step), loss=loss, norm=norm, rate=rate)


FORMATS: dict[str, list[Row]] = {
    "nanogpt.log": [row(0, 10.9886), row(10, 9.5012), row(20, NAN)],
    "llm-c.log": [row(1, 11.032358, 22.1414, 8.57e-07), row(2, 10.958507, 22.0968, 1.71e-06)],
    "llm-c-main.log": [row(1, 11.0324, 22.14, 1e-06), row(2, 10.9585, 22.1, 2e-06)],
    "megatron.log": [row(10, 10.88541, 5.217, 0.0002999), row(20, 9.912, NAN, 0.0003)],
    "torchtitan.log": [row(1, 12.2713, 3.4012), row(10, 9.8214, 2.12)],
    "fairseq.log": [row(100, 13.147, 3.489, 1.25e-05), row(200, 11.5, 1.9, 2.5e-05), row(300, 10.1, 1.1, 3.75e-05)],
    "fairseq-json.log": [row(100, 16.475, 20.751, 2e-05), row(200, 11.2, NAN, 4e-05)],
    "olmo.log": [row(1, 11.25, 4.521), row(2, 10.73, 3.1)],
    "olmo-core.log": [row(1, 11.08, 5.5, 1.2e-06), row(3, 10.97, 5.1, 3.6e-06)],
    "mmengine.log": [row(50, 1.7176, 3.2745, 0.002), row(100, 1.5, 3.1, 0.002), row(150, 1.4, NAN, 0.002)],
    "mmengine-iterations.log": [row(50, 2.5, 1.1, 0.0099), row(100, 2.1, 1.0, 0.0098)],
    "mmengine-scalars.json": [row(50, 1.71, 3.27, 0.002), row(100, 1.5, NAN, 0.002)],
    "mmdet2.log.json": [row(50, 1.9, 2.5, 0.01), row(100, 1.8, 2.4, 0.01), row(150, 1.7, 2.3, 0.01)],
    "mmdet2.log": [row(50, 1.9, 2.5, 0.001978), row(150, 1.7, 2.3, 0.001978)],
    "detectron2-metrics.json": [row(19, 1.9, None, 0.001), row(39, INF, None, 0.001)],
    "detectron2.log": [row(19, 1.9, None, 0.0001), row(39, 1.7, None, 0.0002)],
    "mae-log.txt": [row(0, 0.61, None, 0.0001), row(1, 0.55, None, 0.0002)],
    "mae.log": [row(0, 1.9012, None, 0.0), row(20, 1.7001, None, 1e-05), row(1251, 1.2001, None, 0.0001)],
    "beit-log.txt": [row(0, 7.1, 2.5, 0.0001), row(1, 6.9, 2.1, 0.0002)],
    "dino-log.txt": [row(0, 9.1, None, 0.0002), row(1, 8.2, None, 0.0003)],
    "lightning-metrics.csv": [row(49, 2.0, 0.5, 0.001), row(99, 1.9, 0.4, 0.001), row(149, 1.8, 0.3, 0.001)],
    "transformers-stdout.log": [row(0, 2.1, 1.5, 5e-05), row(1, 1.9, NAN, 4e-05)],
    "llama-factory-trainer_log.jsonl": [row(10, 1.2, None, 1e-05), row(20, 1.1, None, 2e-05)],
    "ms-swift-logging.jsonl": [row(5, 1.2, 2.5, 1e-05), row(10, 1.1, 2.1, 2e-05)],
    "wandb-export.csv": [row(0, 2.0), row(1, 1.9)],
    "wandb-history.jsonl": [row(10, 2.0, 0.7, 0.1), row(20, NAN, NAN)],
    "trackio-export.csv": [row(0, 2.0, 1.5, 0.1)],
    "list.json": [row(0, 2.0, 1.5), row(1, 1.9)],
    "columns.json": [row(0, 2.0, None, 0.1), row(1, 1.9, None, 0.1)],
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_tool_writes_is_read_with_its_steps(name: str) -> None:
    assert str(read_log(SAMPLES / name).rows()) == str(FORMATS[name])


def test_every_sample_has_its_rows() -> None:
    assert {path.name for path in SAMPLES.iterdir()} == set(FORMATS)


def test_a_trainer_state_is_read_without_its_evaluations_and_its_mean(tmp_path: Path) -> None:
    history = [
        {"epoch": 0.1, "grad_norm": 1.5, "learning_rate": 5e-05, "loss": 2.1, "step": 10},
        {"epoch": 0.1, "eval_loss": 1.9, "eval_runtime": 1.0, "step": 10},
        {"epoch": 0.2, "grad_norm": NAN, "learning_rate": 4e-05, "loss": 0.0, "step": 20},
        {"epoch": 0.2, "train_loss": 1.05, "train_runtime": 3.0, "step": 20},
    ]
    state = {"best_metric": None, "global_step": 20, "log_history": history, "max_steps": 20}
    for indent in (2, None):
        rows = read(tmp_path, "trainer_state.json", json.dumps(state, indent=indent))
        assert str(rows) == str([row(10, 2.1, 1.5, 5e-5), row(20, NAN, NAN, 4e-5)])


def test_a_loss_of_zero_with_a_gradient_of_zero_is_a_zero(tmp_path: Path) -> None:
    history = [{"loss": loss, "grad_norm": loss, "step": step} for step, loss in enumerate([0.0, 0.5, 0.0])]
    rows = read(tmp_path, "trainer_state.json", json.dumps({"log_history": history}))
    assert [each.loss for each in rows] == [0.0, 0.5, 0.0]


def test_of_a_trainers_checkpoints_the_newest_has_the_whole_log(tmp_path: Path) -> None:
    for folder in ("a/checkpoint-500", "a/checkpoint-1000", "b", "b/checkpoint-500"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "trainer_state.json").write_text("{}")
    found = [path.relative_to(tmp_path).as_posix() for path in find_logs(tmp_path)]
    assert found == ["a/checkpoint-1000/trainer_state.json", "b/trainer_state.json"]


def test_one_run_of_several_in_a_table_is_chosen_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "export.csv"
    path.write_text('"Step","sun-1 - train/loss","sea-2 - train/loss"\n"0","2.0","3.0"\n')
    with pytest.raises(LogError, match="several runs, choose one with --run; found sun-1, sea-2"):
        read_log(path)
    assert read_log(path, run="sea-2").rows() == [row(0, 3.0)]


def test_mlflow_runs_are_found_in_their_store(tmp_path: Path) -> None:
    for run in ("1f", "2e"):
        folder = tmp_path / "mlruns/0" / run
        (folder / "metrics/train").mkdir(parents=True)
        (folder / "meta.yaml").write_text("run_id: x\n")
        (folder / "metrics/train/loss").write_text("1767600000000 2.0 0\n1767600001000 nan 10\n")
        (folder / "metrics/grad_norm").write_text("1767600000000 1.5 0\n1767600001000 inf 10\n")
        (folder / "metrics/val_loss").write_text("1767600000000 3.0 0\n")
    runs = find_logs(tmp_path)
    assert [path.name for path in runs] == ["1f", "2e"]
    assert str(read_log(runs[0]).rows()) == str([row(0, 2.0, 1.5), row(10, NAN, INF)])


def test_trackio_databases_are_read_by_run(tmp_path: Path) -> None:
    path = tmp_path / "project.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "CREATE TABLE metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, timestamp TEXT NOT NULL, "
            "run_name TEXT NOT NULL, step INTEGER NOT NULL, metrics TEXT NOT NULL)"
        )
        for run, loss in (("old", 3.0), ("new", 2.0)):
            for step in range(2):
                values = json.dumps({"train/loss": loss - step, "grad_norm": "NaN"})
                database.execute("INSERT INTO metrics VALUES (NULL, 'now', ?, ?, ?)", (run, step, values))
    assert str(read_log(path).rows()) == str([row(0, 2.0, NAN), row(1, 1.0, NAN)])
    assert [each.loss for each in read_log(path, run="old").rows()] == [3.0, 2.0]
    with pytest.raises(LogError, match="no run 'other'; found old, new"):
        read_log(path, run="other")


def test_tensorboard_runs_with_scalars_as_tensors_are_found_in_their_folder(tmp_path: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
    for run in ("a", "b"):
        writer = EventFileWriter(str(tmp_path / "runs" / run))
        for step, loss in enumerate([2.0, 1.5, NAN]):
            values = [
                Summary.Value(tag="train/loss", tensor=make_tensor_proto(loss, dtype="float32"), metadata=metadata),
                Summary.Value(tag="weights", tensor=make_tensor_proto([1.0, 2.0], dtype="float32"), metadata=metadata),
            ]
            writer.add_event(Event(step=step, wall_time=float(step), summary=Summary(value=values)))
        writer.close()
    runs = find_logs(tmp_path)
    assert [path.name for path in runs] == ["a", "b"]
    assert str(read_log(runs[0]).rows()) == str([row(0, 2.0), row(1, 1.5), row(2, NAN)])


def test_columns_can_be_named_in_any_format(tmp_path: Path) -> None:
    given = parse_columns("step=batch,loss=objective,norm=g,lr=eta")
    texts = {
        "a.csv": "batch,objective,g,eta,loss\n5,2.0,1.5,0.1,9\n",
        "a.jsonl": '{"batch": 5, "objective": 2.0, "g": 1.5, "eta": 0.1, "loss": 9}\n',
        "a.log": "INFO batch=5 objective=2.0 g=1.5 eta=0.1\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert read_log(tmp_path / name, columns=given).rows() == [row(5, 2.0, 1.5, 0.1)], name


def test_a_named_column_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(LogError, match=r"--columns norm=g: no such column; found step, loss"):
        read_log(path, columns=parse_columns("norm=g"))
    for wrong in ("loss", "weight=w", "loss="):
        with pytest.raises(ValueError, match="expected step=NAME"):
            parse_columns(wrong)
