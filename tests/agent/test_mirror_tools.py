"""What the mirror writes arrives in the real tools, and the script's own rows stay as they are."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import WAIT_SECONDS

pytestmark = [pytest.mark.integration, pytest.mark.trainers]
HOW_TO_GET = {
    "wandb": "make test-trainers",
    "mlflow": "mlflow 3.17 needs an older cachetools than development has, so an environment of its own",
    "trackio": "trackio 0.43 needs an older pillow than development has, so an environment of its own",
}
MIRROR = """
import json, math

def mirror(run, own):
    for row, values in enumerate([(1.0, math.nan, 9.0), (2.0, 5.0, 4.0)]):
        own(row)
        for step, norm in enumerate(values, 10 * row):
            run.write(step, {"foreshock/gradient_norm": norm})
    own(2)
    run.notify("Exploding gradients")
    run.link("http://monitor:9327/run/a")
"""
WANDB = """
import struct
from pathlib import Path
import wandb
from foreshock._mirror import wandb as tool
from wandb.proto.wandb_internal_pb2 import Record

opened = wandb.init(project="p", mode="offline")
run = tool.find()
mirror(run, lambda row: opened.log({"own": row}))
written = {"notice": opened.summary["foreshock/notice"], "page": opened.config["foreshock/page"]}
opened.finish()
assert run.closed
# Ends the process that writes the file.
wandb.teardown()

def records(data):
    # https://github.com/google/leveldb/blob/main/doc/log_format.md, after seven bytes of W&B's own.
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""

(file,) = Path("wandb").glob("offline-run-*/*.wandb")
rows = []
for record in records(file.read_bytes()):
    if record.WhichOneof("record_type") == "history":
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        rows.append({name: value for name, value in row.items() if name not in ("_timestamp", "_runtime")})
print(json.dumps(written | {"rows": rows}))
"""
MLFLOW = """
import mlflow
from foreshock._mirror import mlflow as tool

mlflow.set_tracking_uri("sqlite:///runs.db")
opened = mlflow.start_run()
run = tool.find()
mirror(run, lambda row: mlflow.log_metric("own", row, step=row))
mlflow.flush_async_logging()
mlflow.end_run()
assert run.closed
client = mlflow.MlflowClient()
tags = client.get_run(opened.info.run_id).data.tags
history = {
    name: [[each.step, each.value] for each in client.get_metric_history(opened.info.run_id, name)]
    for name in ("own", "foreshock/gradient_norm")
}
print(json.dumps({"notice": tags["foreshock/notice"], "page": tags["foreshock/page"]} | history))
"""
TRACKIO = """
import trackio
from foreshock._mirror import trackio as tool

trackio.init(project="p", name="r", auto_log_gpu=False)
run = tool.find()
mirror(run, lambda row: trackio.log({"own": row}))
trackio.finish()
assert run.closed
from trackio.sqlite_storage import SQLiteStorage as Storage

def without_time(rows):
    return [{name: value for name, value in row.items() if name != "timestamp"} for row in rows]

print(json.dumps({
    "own": without_time(Storage.get_logs("p", "r")), "mirrored": without_time(Storage.get_system_logs("p", "r")),
    "alerts": sorted((each["level"], each["text"]) for each in Storage.get_alerts("p")),
}))
"""


def result_of(tool: str, script: str, folder: Path) -> Any:
    """What a script prints at its end that has a run of a tool open."""
    if find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed: {HOW_TO_GET[tool]}")
    done = subprocess.run(
        [sys.executable, "-c", MIRROR + script], cwd=folder, capture_output=True, text=True, timeout=3 * WAIT_SECONDS,
        check=False, env={**os.environ, "HOME": str(folder), "TRACKIO_DIR": str(folder), "WANDB_SILENT": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_wandb_has_the_largest_step_in_each_row_of_the_script(tmp_path: Path) -> None:
    found = result_of("wandb", WANDB, tmp_path)
    assert (found["notice"], found["page"]) == ("Exploding gradients", "http://monitor:9327/run/a")
    assert math.isnan(found["rows"][1].pop("foreshock/gradient_norm"))
    assert found["rows"] == [
        {"_step": 0, "own": 0},
        {"_step": 1, "own": 1, "foreshock/step": 1},
        {"_step": 2, "own": 2, "foreshock/step": 11, "foreshock/gradient_norm": 5.0},
    ]


def test_mlflow_has_each_step_and_the_page_and_notice_as_tags(tmp_path: Path) -> None:
    found = result_of("mlflow", MLFLOW, tmp_path)
    assert (found["notice"], found["page"]) == ("Exploding gradients", "http://monitor:9327/run/a")
    assert found["own"] == [[0, 0.0], [1, 1.0], [2, 2.0]]
    mirrored: dict[int, float] = dict(found["foreshock/gradient_norm"])
    assert math.isnan(mirrored.pop(1))
    assert mirrored == {0: 1.0, 2: 9.0, 10: 2.0, 11: 5.0, 12: 4.0}


def test_trackio_has_each_step_by_time_and_the_page_and_notice_as_alerts(tmp_path: Path) -> None:
    found = result_of("trackio", TRACKIO, tmp_path)
    assert found["own"] == [{"step": row, "own": row} for row in range(3)]
    assert [row["foreshock/step"] for row in found["mirrored"]] == [0, 1, 2, 10, 11, 12]
    assert found["mirrored"][4]["foreshock/gradient_norm"] == 5.0
    assert found["alerts"] == [["info", "http://monitor:9327/run/a"], ["warn", "Exploding gradients"]]
