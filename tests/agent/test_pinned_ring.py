"""A ring whose memory is registered with CUDA is read as one that the host writes. CUDA is a fake here."""

from __future__ import annotations

import gc
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from foreshock import _log
from foreshock._output import pinned_ring as module
from foreshock._output import staging
from foreshock._output.pinned_ring import PinnedRing, observed_words, pinned_ring
from foreshock_recorder.layout import HAS_LOSS, HAS_STEP, device_checksum
from foreshock_recorder.reader import RingReader
from foreshock_recorder.records import Record
from foreshock_recorder.ring import Ring
from tests.support.cudart import Cudart
from tests.support.rings import begin, make_ring, measure


def words_of(ring: Ring, sequence: int, value: float, *, number: int = 7, loss: float = 0.5) -> Tensor:
    """A record as the kernel writes it."""
    row = torch.full((ring.layout.columns,), value, dtype=torch.float64)
    payload = torch.tensor(
        [number, int(torch.tensor(loss, dtype=torch.float64).view(torch.int64)), HAS_STEP | HAS_LOSS]
    )
    checks = [device_checksum(part.numpy().tobytes()) for part in (payload, row)]
    observed, measured = (torch.tensor([check - 2**64 * (check >> 63)]) for check in checks)
    marker = torch.tensor([sequence])
    return torch.cat((payload, observed, marker, marker, row.view(torch.int64), measured, marker))


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    return make_ring(tmp_path)


def read(ring: Ring, sequence: int) -> Record:
    reader = RingReader(ring.path)
    record = reader.read(sequence)
    assert isinstance(record, Record)
    return record


def test_a_record_of_the_device_is_read_as_one_of_the_host(ring: Ring) -> None:
    pinned = PinnedRing(ring, Cudart())
    for sequence in range(1, 2 * ring.layout.slot_count):
        begin(ring, sequence)
        pinned.write_words(sequence, words_of(ring, sequence, 2.5 * sequence), observed=True)
        record = read(ring, sequence)
        assert record.measured is not None and set(record.measured) == {2.5 * sequence}
        assert (record.step, record.loss, record.observed) == (7, 0.5, True)
        assert ring.measured == sequence and pinned.flush()


def test_what_the_host_has_written_of_the_same_record_stays(ring: Ring) -> None:
    pinned = PinnedRing(ring, Cudart())
    begin(ring, 1)
    ring.write_observed(1, step=3, loss=1.25)
    pinned.write_words(1, words_of(ring, 1, 4.0), observed=False)
    record = read(ring, 1)
    assert record.measured is not None and set(record.measured) == {4.0}
    assert (record.step, record.loss) == (3, 1.25)
    pinned.write_observed(1, 9, torch.tensor(0.75, dtype=torch.float64))
    assert (read(ring, 1).step, read(ring, 1).loss) == (9, 0.75)
    pinned.write_observed(1, None, torch.tensor(-math.inf, dtype=torch.float64))
    assert read(ring, 1).observed and read(ring, 1).loss == -math.inf


def test_a_record_without_its_end_marker_or_with_another_word_is_not_whole(ring: Ring) -> None:
    pinned = PinnedRing(ring, Cudart())
    for sequence, word in ((1, -1), (2, -2), (3, 8)):
        begin(ring, sequence)
        words = words_of(ring, sequence, 1.0)
        words[word] += 1
        pinned.write_words(sequence, words, observed=True)
        assert read(ring, sequence).measured is None and read(ring, sequence).observed
    begin(ring, 4)
    words = words_of(ring, 4, 1.0)
    words[1] += 1
    pinned.write_words(4, words, observed=True)
    assert read(ring, 4).measured is not None and not read(ring, 4).observed


def test_the_newest_measured_record_is_the_newest_with_an_end_marker(ring: Ring) -> None:
    assert ring.measured == 0
    pinned = PinnedRing(ring, Cudart())
    begin(ring, 1)
    measure(ring, 1)
    begin(ring, 2)
    assert ring.measured == 1
    pinned.write_words(2, words_of(ring, 2, 1.0), observed=False)
    begin(ring, 3)
    assert ring.measured == 2


def test_a_device_that_never_finishes_is_waited_for_a_limited_time(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.01)
    pinned = PinnedRing(ring, Cudart())
    begin(ring, 1)
    words = words_of(ring, 1, 1.0)
    words[-1] = 0
    pinned.write_words(1, words, observed=False)
    assert not pinned.flush()


def test_an_observed_part_under_way_is_waited_for_too(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.01)
    pinned = PinnedRing(ring, Cudart())
    begin(ring, 1)
    pinned.write_words(1, words_of(ring, 1, 1.0), observed=False)
    assert pinned.flush()
    pinned.observed_words = lambda loss, number, sequence: observed_words(loss, number, sequence - 1)
    pinned.write_observed(1, 7, torch.tensor(0.5, dtype=torch.float64))
    assert not pinned.flush()


def test_rows_of_tensor_operations_go_the_same_way(ring: Ring) -> None:
    pinned = PinnedRing(ring, Cudart())
    begin(ring, 1)
    blocks = torch.randn(ring.layout.weights.words, dtype=torch.float64)
    row = torch.randn(ring.layout.columns, dtype=torch.float64)
    row[:3] = torch.tensor([math.nan, math.inf, -0.0])
    pinned.write_weights(1, blocks)
    pinned.write_measured(1, row)
    record = read(ring, 1)
    assert record.measured is not None and record.weights is not None
    assert list(map(repr, record.measured)) == list(map(repr, row.tolist()))
    assert list(record.weights) == blocks.tolist()
    assert ring.measured == 1 and pinned.flush()


@pytest.mark.parametrize("observed", [True, False])
def test_where_nothing_is_pinned_a_kernels_record_is_written_by_the_host(ring: Ring, observed: bool) -> None:
    begin(ring, 1)
    staging._write_words(ring, 1, words_of(ring, 1, 2.5).tolist(), observed=observed)
    record = read(ring, 1)
    assert record.measured is not None and set(record.measured) == {2.5}
    assert (record.loss, record.observed) == ((0.5, True) if observed else (None, False))


def test_memory_that_the_device_may_still_write_is_not_given_back(ring: Ring) -> None:
    cudart = Cudart()
    pinned = PinnedRing(ring, cudart)
    begin(ring, 1)
    words = words_of(ring, 1, 1.0)
    words[-1] = 0
    pinned.write_words(1, words, observed=False)
    pinned.close()
    del pinned
    gc.collect()
    assert cudart.registered


def test_the_memory_is_registered_whole_and_given_back_once(ring: Ring) -> None:
    cudart = Cudart()
    pinned = PinnedRing(ring, cudart)
    assert list(cudart.registered.values()) == [ring.layout.file_bytes]
    pinned.close()
    pinned.close()
    assert cudart.registered == {}


def test_the_memory_is_given_back_with_the_ring(ring: Ring) -> None:
    cudart = Cudart()
    pinned = PinnedRing(ring, cudart)
    assert cudart.registered
    del pinned
    gc.collect()
    assert cudart.registered == {}


@pytest.fixture
def _nothing_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log, "_logged", set())


@pytest.mark.usefixtures("_nothing_logged")
def test_memory_that_cannot_be_registered_is_one_line_in_the_log(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "foreshock")
    assert pinned_ring(ring, Cudart(status=2)) is None
    assert pinned_ring(ring, Cudart(status=2)) is None
    assert pinned_ring(ring, object()) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cudaHostRegister returned 2" in caplog.text
    assert pinned_ring(ring, Cudart()) is not None
