"""What the probe writes into a ring is what the recorder reads, or nothing."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foreshock_protos.columns import MEASURED_NAMES, WEIGHT_BLOCKS
from foreshock_recorder.layout import EDITED, FACTS, LAYOUT_VERSION, MAX_RING_BYTES, ExitReason, Layout, NormHistory
from foreshock_recorder.paths import ring_folder, ring_name, run_folder
from foreshock_recorder.process import start_ticks
from foreshock_recorder.reader import RingReader
from foreshock_recorder.records import ReadOutcome, Record
from foreshock_recorder.ring import Ring
from tests.support.repository import ROOT
from tests.support.rings import LAYERS, begin, identity, make_ring, measure, step

TORN_SECONDS = 2.0
SCRIBBLER = """
import sys
from pathlib import Path
from tests.support.rings import LAYERS, begin, make_ring
from foreshock_protos.columns import MEASURED_NAMES, WEIGHT_BLOCKS
from array import array

ring = make_ring(Path(sys.argv[1]), slots=4)
memory = memoryview(ring.memory)
width = len(MEASURED_NAMES) + 2 * LAYERS
sequence = 0
while True:
    sequence += 1
    ring.begin_step(sequence, step=sequence, wall=sequence, monotonic=sequence, learning_rate=sequence)
    ring.open_measured(sequence)
    offset = ring.measured_offset(sequence)
    # Two halves, so that a reader comes in between.
    memory[offset : offset + 8 * width].cast("d")[: width // 2] = array("d", [sequence] * (width // 2))
    memory[offset : offset + 8 * width].cast("d")[width // 2 :] = array("d", [sequence] * (width - width // 2))
    ring.close_measured(sequence)
    ring.write_observed(sequence, step=None, loss=sequence)
"""


def record(reader: RingReader, sequence: int) -> Record:
    found = reader.read(sequence)
    assert isinstance(found, Record), found
    return found


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    return make_ring(tmp_path / "run", slots=8)


@pytest.fixture
def reader(ring: Ring) -> RingReader:
    return RingReader(ring.path)


def test_a_record_comes_back_as_it_was_written(ring: Ring, reader: RingReader) -> None:
    ring.begin_step(1, step=7, wall=1.5, monotonic=2.5, learning_rate=0.1, flags=EDITED)
    measure(ring, 1)
    ring.write_observed(1, step=None, loss=0.75)
    found = record(reader, 1)
    assert (found.step, found.wall_seconds, found.monotonic_seconds) == (7, 1.5, 2.5)
    assert (found.learning_rate, found.flags, found.observed, found.loss) == (0.1, EDITED, True, 0.75)
    assert found.measured is not None
    assert len(found.measured) == len(MEASURED_NAMES) + 2 * LAYERS
    assert found.measured[MEASURED_NAMES.index("global_norm")] == pytest.approx(1.01)
    assert list(found.measured[-2 * LAYERS :]) == [1.5, 2.5, 3.5, 4.5]
    assert (reader.begun, reader.measured) == (1, 1)


def test_the_identity_comes_back_as_it_was_written(reader: RingReader) -> None:
    assert reader.identity == identity()
    assert reader.pid == os.getpid()


def test_a_step_told_later_is_the_records_step(ring: Ring, reader: RingReader) -> None:
    step(ring, 1)
    ring.write_observed(1, step=50_000, loss=None)
    assert record(reader, 1).step == 50_000
    assert record(reader, 1).loss is None


def test_a_loss_that_is_no_number_is_still_a_loss(ring: Ring, reader: RingReader) -> None:
    step(ring, 1, loss=math.nan)
    loss = record(reader, 1).loss
    assert loss is not None and math.isnan(loss)


def test_a_record_that_has_not_begun_cannot_be_read(ring: Ring, reader: RingReader) -> None:
    assert reader.read(1) is ReadOutcome.NOT_YET
    step(ring, 1)
    assert reader.read(2) is ReadOutcome.NOT_YET


def test_a_record_that_has_begun_has_no_measures_yet(ring: Ring, reader: RingReader) -> None:
    begin(ring, 1)
    found = record(reader, 1)
    assert (found.measured, found.observed, found.loss) == (None, False, None)


def test_a_row_that_is_still_being_copied_is_not_read(ring: Ring, reader: RingReader) -> None:
    for sequence in range(1, 10):
        step(ring, sequence)
    begin(ring, 10)
    ring.open_measured(10)
    assert record(reader, 10).measured is None
    assert reader.measured == 9


def test_an_overwritten_record_is_an_overrun(ring: Ring, reader: RingReader) -> None:
    for sequence in range(1, 21):
        step(ring, sequence)
    assert reader.oldest == 13
    assert reader.read(12) is ReadOutcome.OVERRUN
    assert record(reader, 13).step == 113


def test_a_record_that_was_passed_over_is_not_taken_for_the_old_one_in_its_slot(ring: Ring, reader: RingReader) -> None:
    for sequence in (*range(1, 9), 10):
        step(ring, sequence)
    assert reader.read(9) is ReadOutcome.OVERRUN


def test_a_flipped_bit_is_noticed(ring: Ring, reader: RingReader) -> None:
    step(ring, 1)
    ring.memory[ring.measured_offset(1) + 3] ^= 1
    assert record(reader, 1).measured is None


@pytest.mark.integration
def test_no_torn_record_is_ever_accepted(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", SCRIBBLER, str(tmp_path / "run")], cwd=ROOT)
    try:
        path = tmp_path / "run" / ring_name("first", 0)
        while not path.exists():
            assert writer.poll() is None
        reader = RingReader(path)
        whole = partly = overrun = 0
        deadline = time.monotonic() + TORN_SECONDS
        while time.monotonic() < deadline:
            # The newest, or one a few steps older; before the first step the first, which may begin just now.
            sequence = max(1, reader.begun - whole % 4)
            found = reader.read(sequence)
            if not isinstance(found, Record):
                overrun += 1
                continue
            assert found.step == found.wall_seconds == found.monotonic_seconds == found.learning_rate == sequence
            if found.measured is not None:
                assert set(found.measured) == {sequence}
            if found.observed:
                assert found.loss == sequence
            partly += found.measured is None
            whole += found.measured is not None
        assert whole > 1000
        assert overrun > 0 and partly > 0, "the reader has never met the writer"
        reader.close()
    finally:
        writer.kill()
        writer.wait()


def test_what_the_recorder_says_reaches_the_rank(ring: Ring, reader: RingReader) -> None:
    assert (ring.acknowledged, ring.exit_acknowledged, ring.recorder_seen, ring.problem) == (0, False, 0.0, "")
    assert [ring.history] == [None]
    reader.acknowledge(3, exited=True)
    reader.heartbeat(12.5)
    reader.write_problem("monitor:4327: connection refused")
    assert (ring.acknowledged, ring.exit_acknowledged, ring.recorder_seen) == (3, True, 12.5)
    assert ring.problem == "monitor:4327: connection refused"
    reader.write_problem("")
    assert ring.problem == ""

    reader.write_history(NormHistory(mean=0.1, recent=0.2, deviation=0.3, steps=400, learning_rate=1e-3))
    assert [*(ring.history or ())] == [0.1, 0.2, 0.3, 400, 1e-3]
    assert reader.dropped == {}


def test_an_exit_does_not_hide_the_last_error(ring: Ring, reader: RingReader) -> None:
    ring.count_dropped("probe_error")
    ring.count_dropped("probe_error")
    ring.write_error("KeyError: 'momentum'")
    ring.write_exit(ExitReason.EXCEPTION, "ValueError: no more data")
    assert reader.dropped == {"probe_error": 2}
    assert reader.last_error == "KeyError: 'momentum'"
    assert (reader.exit_reason, reader.exit_detail) == (ExitReason.EXCEPTION, "ValueError: no more data")


def test_a_long_text_is_cut_and_touches_nothing_else(ring: Ring, reader: RingReader) -> None:
    ring.write_exit(ExitReason.FINISHED, "left")
    ring.write_error("ä" * 1000)
    reader.write_problem("\udc80" + "x" * 1000)
    assert reader.last_error.startswith("ääää")
    assert len(ring.problem) == 255
    assert reader.exit_detail == "left"
    assert reader.identity == identity()


def test_a_file_that_is_no_ring_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"short", bytes(8192)):
        path = tmp_path / "x.ring"
        path.write_bytes(content)
        with pytest.raises(ValueError):
            RingReader(path)


def test_a_ring_of_another_layout_is_refused_and_says_so(ring: Ring) -> None:
    ring.memory[8] = LAYOUT_VERSION + 1
    with pytest.raises(
        ValueError, match=rf"not a ring of layout {LAYOUT_VERSION}: made by another version of foreshock\?"
    ):
        RingReader(ring.path)


def test_a_truncated_ring_is_refused(ring: Ring) -> None:
    os.truncate(ring.path, 8192)
    with pytest.raises(ValueError, match="damaged"):
        RingReader(ring.path)


def test_a_ring_is_ours_alone_and_leaves_no_draft(tmp_path: Path) -> None:
    ring = make_ring(tmp_path / "deep" / "run")
    assert ring.path.stat().st_mode & 0o777 == 0o600
    assert ring.path.parent.stat().st_mode & 0o777 == 0o700
    assert list(ring.path.parent.iterdir()) == [ring.path]


def test_every_folder_that_is_made_is_ours_alone(tmp_path: Path) -> None:
    path = make_ring(ring_folder("night", "first", str(tmp_path / "rings"))).path
    for folder in (path.parent, path.parent.parent, tmp_path / "rings"):
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("level", [0, 1])
def test_a_link_in_place_of_a_folder_or_a_ring_is_not_followed(tmp_path: Path, level: int) -> None:
    folder = ring_folder("night", "first", str(tmp_path / "rings"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = (folder, folder.parent)[level]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere)
    with pytest.raises(OSError, match="is not a folder"):
        make_ring(folder)
    other = make_ring(tmp_path / "run")
    (tmp_path / "link.ring").symlink_to(other.path)
    with pytest.raises(OSError):
        RingReader(tmp_path / "link.ring")


def test_a_ring_fits_a_containers_shared_memory_however_many_layers(tmp_path: Path) -> None:
    for layers in (0, 1, 100, 2000):
        ring = Ring.create(tmp_path / ring_name("first", layers), identity(), layers=layers)
        assert ring.path.stat().st_size <= MAX_RING_BYTES + 8192
        assert ring.layout.slot_count >= 64


def test_a_leftover_draft_does_not_stop_a_rank(tmp_path: Path) -> None:
    (tmp_path / ring_name("first", 0)).with_suffix(".draft").write_bytes(b"of a rank that was killed")
    assert RingReader(make_ring(tmp_path).path).identity == identity()


def test_a_run_has_a_folder_of_its_own_whatever_its_name() -> None:
    names = ["night", "a/b", "a_b", "a:b", "..", ".", "../../etc", "ü", "u", "x" * 200, "x" * 199, ".night"]
    folders = {run_folder(name, "/rings") for name in names}
    assert len(folders) == len(names)
    for folder in folders:
        assert folder.parent == Path("/rings") and not folder.name.startswith(".") and len(folder.name) < 128
    assert run_folder("night", "/rings").name == "night"
    assert ring_folder("night", "first", "/rings") == Path("/rings/night/first")


def test_the_environment_says_where_rings_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORESHOCK_RING_DIR", "/elsewhere")
    assert run_folder("night") == Path("/elsewhere/night")
    monkeypatch.delenv("FORESHOCK_RING_DIR")
    assert run_folder("night").parent.name == f"foreshock-{os.getuid()}"


@pytest.mark.integration
def test_a_rank_is_alive_until_it_dies_even_unburied(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tests.support.rings import make_ring;"
    code += "ring = make_ring(Path(sys.argv[1]));"
    child = subprocess.Popen(
        [sys.executable, "-c", code + "print(flush=True); sys.stdin.read()", str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        reader = RingReader(tmp_path / ring_name("first", 0))
        assert reader.alive
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert start_ticks(child.pid) is None and not reader.alive


@pytest.mark.integration
def test_a_rank_is_dead_though_a_child_of_it_lives_on(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from tests.support.rings import make_ring
ring = make_ring(Path(sys.argv[1]))
child = os.fork()
if child:
    print(child, flush=True)
signal.pause()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            reader = RingReader(tmp_path / ring_name("first", 0))
            assert reader.alive
            parent.kill()
            parent.wait()
            assert start_ticks(child) is not None and not reader.alive
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.integration
def test_a_rank_does_not_die_with_a_child_of_it(ring: Ring, reader: RingReader) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert reader.alive


def test_a_rank_is_alive_whatever_its_number_is_in_another_namespace(ring: Ring, reader: RingReader) -> None:
    FACTS.pack_into(ring.memory, 0, *FACTS.unpack_from(ring.memory)[:7], 2**31 - 1, 7)
    reader = RingReader(ring.path)
    assert reader.pid == 2**31 - 1 and reader.alive


def test_a_ring_that_is_given_up_is_a_few_kilobytes_that_count_what_was_lost(ring: Ring) -> None:
    for sequence in range(1, 21):
        step(ring, sequence)
    ring.write_exit(ExitReason.EXCEPTION, "ValueError: no more data")
    reader = RingReader(ring.path)
    reader.acknowledge(5)
    assert reader.give_up() == 15
    assert ring.path.stat().st_size == ring.layout.header_bytes
    left = RingReader(ring.path)
    assert left.given_up and left.dropped == {"given_up": 15} and left.identity == identity()
    assert (left.begun, left.acknowledged, left.exit_reason) == (5, 5, ExitReason.EXCEPTION)
    assert left.read(5) is ReadOutcome.OVERRUN and left.read(6) is ReadOutcome.NOT_YET


def blocks_of(sequence: int) -> list[float]:
    return [sequence + i / 100 for i in range(len(WEIGHT_BLOCKS) * LAYERS)]


@pytest.mark.parametrize("every", [10, 25])
def test_weights_by_layer_come_back_for_as_long_as_the_record_that_measured_them(tmp_path: Path, every: int) -> None:
    ring = make_ring(tmp_path / "run")
    reader = RingReader(ring.path)
    for sequence in range(1, ring.layout.slot_count + 2 * every):
        begin(ring, sequence)
        if sequence % every == 1:
            ring.write_weights(sequence, blocks_of(sequence))
        measure(ring, sequence)
    for sequence in range(reader.oldest, ring.begun + 1):
        weights = record(reader, sequence).weights
        assert (weights is not None) == (sequence % every == 1)
        assert weights is None or list(weights) == blocks_of(sequence)


def test_weights_that_a_later_step_has_overwritten_cost_the_record_nothing_else(ring: Ring, reader: RingReader) -> None:
    later = 1 + ring.layout.weight_slots
    for sequence in (1, later):
        begin(ring, sequence)
        ring.write_weights(sequence, blocks_of(sequence))
        measure(ring, sequence)
    assert record(reader, 1).weights is None and record(reader, 1).measured is not None
    assert record(reader, later).weights is not None


def test_weights_by_layer_take_little_of_the_ring() -> None:
    layout = Layout(100, 100)
    assert layout.weight_slots * layout.weight_slot_bytes < 0.25 * layout.slot_count * layout.slot_bytes
