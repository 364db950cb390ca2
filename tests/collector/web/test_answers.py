"""What the page asks of the collector, and what its files may do."""

from __future__ import annotations

import io
import json
import math
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foreshock_collector.analysis.channel import ChannelState
from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.records.batch import decode
from foreshock_collector.records.buffer import RecordBuffer
from foreshock_collector.records.layer_weights import LayerWeights
from foreshock_collector.records.window import Window
from foreshock_collector.state.fleet import Runs
from foreshock_collector.web.baseline import Baseline
from foreshock_collector.web.heat import CARRIED_STEPS, MOST_ROWS, carried_forward, downsample, incident_norms
from foreshock_collector.web.live import ChangeStreams
from foreshock_protos.columns import WEIGHT_BLOCKS
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.streamed_job import LAYERS, LOUD_LAYER, LOUD_RANK, Job
from tests.support.streams import steps

Jobs = Callable[..., Job]


def get(url: str, accept: str = "text/html") -> tuple[int, str, Any]:
    """Status, body, headers."""
    request = urllib.request.Request(url, headers={"Accept": accept})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers


def ask(url: str) -> Any:
    return json.loads(get(url, "application/json")[1])


def test_the_band_is_the_detectors_own_history_and_a_bad_step_is_none() -> None:
    norms = [math.exp(0.1 * math.sin(i)) for i in range(60)]
    channel = ChannelState()
    for norm in norms:
        channel.scan((norm,), DEFAULT.gradient)
    baseline = Baseline()
    rows = len(norms) + 2
    # A step that is not finite follows, as the store tells it, and another.
    bad = ["", "nan"]
    columns = {"sequence": [*range(1, rows + 1)], "global_norm": [*norms, None, 1.0]}
    columns |= {
        "learning_rate": [0.1] * rows,
        "loss_nonfinite": [""] * rows,
        "gradient_nonfinite": [*[""] * len(norms), *reversed(bad)],
    }
    baseline.extend(columns)
    expected = channel.band(DEFAULT.gradient)
    assert expected is not None
    found = baseline.at([10, 61, 62])
    assert found["usual_low"] == [None, expected[0], expected[0]]
    assert found["usual_high"] == [None, expected[1], expected[1]]
    resumed = Baseline(inherited=channel)
    resumed.extend({name: values[:1] for name, values in columns.items()})
    assert resumed.at([1]) == {"usual_low": [expected[0]], "usual_high": [expected[1]]}
    x, sigma = channel.mean, max(1.2533 * channel.deviation, DEFAULT.gradient.least_sigma)
    assert expected == pytest.approx((math.exp(x - 3 * sigma), math.exp(x + 3 * sigma)))


def test_a_cell_of_a_heat_map_is_the_largest_of_its_block_and_never_hides_what_is_not_finite() -> None:
    table = np.ones((1000, 300))
    table[:10] = math.nan
    table[500, 200] = 9.0
    table[700, 3] = math.inf
    found = downsample(np.arange(1, 1001), [str(i) for i in range(300)], table, columns=100)
    assert found["bin_width"] == 10
    assert found["sequence"][0] == 11
    assert len(found["rows"]) <= MOST_ROWS
    assert found["rows"][0] == "0 to 2"
    cells = np.array([[{"inf": -1}.get(cell, cell) for cell in row] for row in found["values"]], float)
    assert cells.shape == (len(found["rows"]), len(found["sequence"]))
    assert np.argwhere(cells == 9.0).tolist() == [[200 // 3, (500 - 10) // 10]]
    assert np.argwhere(cells == -1).tolist() == [[3 // 3, (700 - 10) // 10]]


def test_of_a_run_at_rest_the_records_before_an_incident_are_shown() -> None:
    buffer = RecordBuffer(world_size=2, layers=2)
    for rank in (0, 1):
        norms: dict[str, Any] = {"local_norm": [70.0 + rank, 80.0 + rank, 1.0], "flags": [pb.LOCAL_NORMS] * 3}
        norms |= {"local_nan_parameters": [0.0, 0.0, 2.0 * rank]}
        batch = steps(7, [1.0, 2.0, 3.0], **norms).steps
        batch.global_layer_norms.extend([1.0, 2.0, 3.0, 4.0, 5.0, math.nan])
        buffer.write(rank, decode(batch, 2), now=0.0)
    window = Window.from_bytes(Window.from_buffer(buffer, 7, 9).as_bytes())
    asked: dict[str, Any] = {"first": 1, "last": 99, "columns": 10}
    ranks = incident_norms(window, ("a", "b"), "ranks", **asked)
    assert (ranks["sequence"], ranks["rows"]) == ([7, 8, 9], ["0", "1"])
    assert ranks["values"] == [[70.0, 80.0, 1.0], [71.0, 81.0, "inf"]]
    layers = incident_norms(window, ("a", "b"), "layers", **asked)
    assert (layers["rows"], layers["values"]) == (["a", "b"], [[1.0, 3.0, 5.0], [2.0, 4.0, "inf"]])
    assert incident_norms(window, ("a", "b"), "ranks", first=8, last=8, columns=10)["values"] == [[80.0], [81.0]]
    assert incident_norms(None, (), "ranks", **asked)["values"] == []
    assert [(row["sequence"], row["rank"]) for row in window.largest_records()] == [
        (s, r) for s in (7, 8, 9) for r in (0, 1)
    ]


def test_a_thinned_series_keeps_every_peak(url: str, job: Jobs) -> None:
    run = job("long", ranks=1)
    run.train(500)
    run.train(1, explode=True)
    run.train(499)
    run.train(1, nan=True)
    run.train(99)
    run.stored()
    series = ask(f"{url}/api/v1/runs/long/series?points=100")
    assert series["bin_width"] == 16
    assert 501 in series["sequence"]
    assert series["gradient_nonfinite"].count("nan") == 1
    assert len(series["usual_high"]) == len(series["sequence"]) <= 101
    part = ask(f"{url}/api/v1/runs/long/series?points=100&first=495&last=505")
    assert part["sequence"] == [*range(495, 506)]


def test_a_thinned_series_keeps_the_largest_update_of_each_bin(url: str, job: Jobs) -> None:
    run = job("updates", ranks=1)
    run.train(300)
    run.train(8, explode=True)
    run.train(100)
    run.stored()
    whole = ask(f"{url}/api/v1/runs/updates/series?points=1000")
    measured = {
        sequence: ratio for sequence, ratio in zip(whole["sequence"], whole["update_ratio"], strict=True) if ratio
    }
    assert [*measured] == [*range(1, 409, 10)]
    assert whole["parameter_norm"][0] == pytest.approx(60.01) and whole["parameter_norm"][1] is None
    assert (whole["first_moment_norm"][0], whole["second_moment_norm"][0]) == (0.2, 0.8)
    thinned = ask(f"{url}/api/v1/runs/updates/series?points=26")
    assert thinned["bin_width"] == 16
    largest = [
        max((measured[s] for s in range(start, start + 16) if s in measured), default=None)
        for start in range(1, 409, 16)
    ]
    assert thinned["update_ratio"] == largest
    steps_of = ask(f"{url}/api/v1/runs/updates/steps?after=300&limit=2")
    assert steps_of["update_ratio"] == [measured[301], None]


def test_updates_by_layer_are_shown_until_the_next_are_measured(url: str, job: Jobs) -> None:
    run = job("layered", ranks=1, layers=("a", "b"))
    run.train(40)
    run.stored()
    found = ask(f"{url}/api/v1/runs/layered/heat/updates?columns=1000")
    assert found["rows"] == ["a", "b"] and found["sequence"] == [*range(1, 41)]
    row = found["values"][0]
    assert row[:10] == [row[0]] * 10 and row[10:20] == [row[10]] * 10 and row[0] != row[10]


def test_updates_that_were_measured_too_long_ago_are_not_shown() -> None:
    blocks = np.zeros((2, len(WEIGHT_BLOCKS), 1), "f4")
    blocks[:, WEIGHT_BLOCKS.index("update_layer_ratios"), 0] = (0.5, math.inf)
    weights = LayerWeights(sequences=np.array([10, 20 + CARRIED_STEPS]), blocks=blocks)
    sequences = np.array([9, 10, 9 + CARRIED_STEPS, 10 + CARRIED_STEPS, 20 + CARRIED_STEPS])
    shown = carried_forward(weights, sequences)[:, 0].tolist()
    assert shown == pytest.approx([math.nan, 0.5, 0.5, math.nan, math.inf], nan_ok=True)


def test_updates_before_an_incident_are_kept_and_a_window_of_an_older_version_has_none() -> None:
    buffer = RecordBuffer(world_size=1, layers=2)
    blocks: dict[str, Any] = {"weight_rows": [1], "update_layer_ratios": [0.25, 0.5]}
    buffer.write(0, decode(steps(7, [1.0, 2.0, 3.0], **blocks).steps, 2), now=0.0)
    stored = Window.from_buffer(buffer, 7, 9).as_bytes()
    asked: dict[str, Any] = {"first": 1, "last": 99, "columns": 10}
    updates = incident_norms(Window.from_bytes(stored), ("a", "b"), "updates", **asked)
    assert (updates["sequence"], updates["values"]) == ([8, 9], [[0.25, 0.25], [0.5, 0.5]])
    with np.load(io.BytesIO(stored)) as arrays:
        kept = {name: arrays[name] for name in ("records", "sequences", "layer_norms")}
    file = io.BytesIO()
    np.savez_compressed(file, **kept)
    old = Window.from_bytes(file.getvalue())
    assert incident_norms(old, ("a", "b"), "updates", **asked)["values"] == []


def test_a_history_that_is_carried_on_is_the_same_as_one_read_at_once(url: str, job: Jobs, tmp_path: Path) -> None:
    run = job("grown", ranks=1)
    run.train(11_000)
    run.stored()
    ask(f"{url}/api/v1/runs/grown/series?points=1000")
    run.train(700)
    run.train(1, nan=True)
    run.train(4)
    run.stored()
    carried = ask(f"{url}/api/v1/runs/grown/series?points=1000")
    store = sqlite3.connect(f"file:{tmp_path / 'db'}?mode=ro", uri=True)
    rows = store.execute("SELECT sequence, global_norm FROM steps WHERE run='grown' ORDER BY sequence").fetchall()
    store.close()
    assert carried["bin_width"] == 16
    wanted = []
    for start in range(0, len(rows), 16):
        stretch = rows[start : start + 16]
        wanted.append(max(stretch, key=lambda row: math.inf if row[1] == "nan" else row[1])[0])
    assert carried["sequence"] == wanted
    # Wider than all steps, so that no bin is complete.
    (peak,) = ask(f"{url}/api/v1/runs/grown/series?points=1")["sequence"]
    assert rows[peak - 1][1] == "nan"


def test_one_look_at_all_runs_serves_every_viewer_for_a_moment() -> None:
    seconds = 0.0
    live = ChangeStreams(runs=Runs(), clock=lambda: 0.0, silent=900.0, monotonic=lambda: seconds)
    first = live.fingerprints(None)
    assert live.fingerprints(None) is first
    seconds += 0.2
    assert live.fingerprints(None) is not first


def test_ranks_and_layers_over_steps_are_told_and_an_incident_outlives_its_run(url: str, job: Jobs) -> None:
    run = job("told")
    run.train(100)
    run.train(5, explode=True)
    run.train(1, nan=True)
    run.stored()
    ranks = ask(f"{url}/api/v1/runs/told/heat/ranks?first=90")
    assert ranks["rows"] == ["0", "1", "2", "3"]
    assert ranks["sequence"] == [*range(90, 107)]
    assert [row[-1] for row in ranks["values"]].index("inf") == LOUD_RANK
    layers = ask(f"{url}/api/v1/runs/told/heat/layers?first=90")
    assert layers["rows"] == list(LAYERS)
    before, after = (np.array([row[i] for row in layers["values"]], float) for i in (0, -2))
    assert int((after / before).argmax()) == LOUD_LAYER


def test_runbooks_are_pages_for_people_and_markdown_for_machines(url: str) -> None:
    page, text = f"{url}/runbooks/ForeshockExplodingGradients", "# ForeshockExplodingGradients"
    status, body, headers = get(page)
    assert (status, headers.get_content_type()) == (200, "text/html")
    assert "<h1>ForeshockExplodingGradients</h1>" in body
    for address, accept in ((page, "text/markdown"), (f"{page}.md", "text/html")):
        status, body, headers = get(address, accept)
        assert (status, headers.get_content_type()) == (200, "text/markdown")
        assert body.startswith(text)
    status, body, _ = get(f"{url}/runbooks/%3Cscript%3E")
    assert status == 404
    assert "<script>" not in body


@pytest.mark.parametrize("folder", ["static", "runbooks", "run", "api/v1/runs", "api/v1"])
@pytest.mark.parametrize("up", ["../", "..%2F", "%2e%2e%2f", "..%5C", "%252e%252e%252f", "//", "x/../../"])
def test_no_path_leaves_what_the_collector_serves(url: str, folder: str, up: str) -> None:
    for target in ("etc/passwd", "app.py", "__init__.py", "page.py", "README.md"):
        status, body, _ = get(f"{url}/{folder}/{4 * up}{target}")
        assert status in (400, 404) and "root:" not in body and "import" not in body


def test_pages_may_run_their_own_scripts_and_no_others(url: str) -> None:
    for path in ("/", "/run/nothing", "/runbooks"):
        policy = dict(part.split(" ", 1) for part in get(url + path)[2]["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == "'self'"
        assert policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
    assert get(f"{url}/run/nothing")[0] == 404
    assert get(f"{url}/api/v1/runs")[2]["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_nothing_can_be_changed_through_the_page(url: str) -> None:
    for path in ("/", "/api/v1/runs", "/api/v1/live", "/runbooks"):
        request = urllib.request.Request(url + path, method="POST", data=b"x")
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(request, timeout=10)
        refusal.value.close()
        assert refusal.value.code == 405


def test_a_stream_announces_a_change(url: str, job: Jobs) -> None:
    run = job("streamed")
    run.train(10)
    run.stored()
    with urllib.request.urlopen(f"{url}/api/v1/live?run=streamed", timeout=10) as stream:
        assert stream.headers.get_content_type() == "text/event-stream"
        assert stream.readline() == b"event: change\n"
        run.train(1)
        while stream.readline() != b"event: change\n":
            pass


@pytest.mark.parametrize("query", ["points=many", "first=-1", "attempt=7"])
def test_a_wrong_question_is_answered_by_name(url: str, job: Jobs, query: str) -> None:
    job("asked").stored()
    status, body, _ = get(f"{url}/api/v1/runs/asked/series?{query}", "application/json")
    assert status in (400, 404)
    assert query.partition("=")[0] in json.loads(body)["error"]


def test_of_many_ended_runs_only_as_many_are_told_as_are_wanted(url: str, job: Jobs) -> None:
    for name in ("a", "b", "c"):
        run = job(name, ranks=1)
        run.train(3)
        run.stored()
        run.finish()
    job("active").stored()
    found = ask(f"{url}/api/v1/runs?recent=1&ended=1")
    assert [each["run"] for each in found["runs"]] == ["active", "c"]
    assert found["ended"] == 3
