"""Rings that hold what no probe writes: a recorder leaves them alone or reads them, and serves the others."""

from __future__ import annotations

import asyncio
import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock_recorder.delivery import Delivery
from foreshock_recorder.folder import contents, lock
from foreshock_recorder.layout import FACTS, JSON_OFFSET, Layout
from foreshock_recorder.ranks import Rank
from tests.support.fake_collector import FakeCollector
from tests.support.fuzzing import bounded
from tests.support.ring_bytes import serve, whole_ring
from tests.support.rings import FIRST, SECOND, identity, make_ring, step
from tests.support.waiting import WAIT_SECONDS

_WORDS = (0, 1, 63, 64, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63, 2**64 - 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A ring with some records."""
    return whole_ring(tmp_path_factory.mktemp("whole") / "run" / "first")


def with_identity(ring: bytes, text: bytes) -> bytes:
    """Another identity in the header, whose size and facts fit."""
    magic, version, columns, slot_bytes, slots, layers, _, pid, started = FACTS.unpack_from(ring)
    layout = Layout(layers, len(text), slots)
    header = FACTS.pack(magic, version, columns, slot_bytes, slots, layers, len(text), pid, started)
    made = bytearray(layout.file_bytes)
    made[:JSON_OFFSET] = ring[:JSON_OFFSET]
    made[: len(header)] = header
    made[JSON_OFFSET : JSON_OFFSET + len(text)] = text
    return bytes(made)


@bounded(200)
@given(
    changes=st.lists(
        st.tuples(
            st.one_of(st.integers(0, JSON_OFFSET // 8), st.integers(0, 2**16)),
            st.one_of(st.sampled_from(_WORDS), st.integers(0, 2**64 - 1)),
        ),
        min_size=1,
        max_size=6,
    ),
    size=st.one_of(st.none(), st.none(), st.integers(0, 2**16), st.just(4096)),
)
def test_any_words_in_a_ring_are_read_or_left_alone(
    whole: bytes, tmp_path: Path, changes: list[tuple[int, int]], size: int | None
) -> None:
    data = bytearray(whole)
    for word, value in changes:
        if 8 * word + 8 <= len(data):
            data[8 * word : 8 * word + 8] = struct.pack("<Q", value)
    path = tmp_path / "first-0.ring"
    path.write_bytes(data if size is None else data[:size])
    serve(path)


_json: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.sampled_from((0.5, 1e308)) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@bounded(60)
@given(name=st.sampled_from((*identity(), "model.layers", "model.module_types", "optimizer.type")), value=_json)
def test_any_value_in_an_identity_is_read_or_left_alone(whole: bytes, tmp_path: Path, name: str, value: Any) -> None:
    said = identity()
    group, _, member = name.partition(".")
    said[group] = {**said[group], member: value} if member else value
    path = tmp_path / "first-0.ring"
    path.write_bytes(with_identity(whole, json.dumps(said).encode()))
    serve(path)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"[]", b"3", b"null", b"{", b"\xff" * 8, b""])
def test_an_identity_that_is_no_object_is_left_alone(whole: bytes, tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "first-0.ring"
    path.write_bytes(with_identity(whole, text))
    assert contents(tmp_path) is None
    with pytest.raises(ValueError, match=r"damaged|Expecting|decode|no room"):
        Rank(path)


def test_a_process_number_that_no_system_has_stops_no_other_delivery(folder: Path, collector: FakeCollector) -> None:
    for rank in (0, 1):
        ring = make_ring(folder, rank)
        step(ring, 1)
        if rank == 0:
            damaged = bytearray(ring.path.read_bytes())
            facts = list(FACTS.unpack_from(damaged))
            facts[7] = 2**32 - 1
            damaged[: FACTS.size] = FACTS.pack(*facts)
            ring.path.write_bytes(damaged)

    async def run() -> None:
        held = lock(folder)
        assert held is not None
        delivery = Delivery(folder, held, collector=collector.address, linger=WAIT_SECONDS, empty=math.inf)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while collector.position[SECOND] < 1:
                    delivery.poll(time.monotonic())
                    await asyncio.sleep(0.01)
        finally:
            await delivery.close()

    asyncio.run(run())
    assert FIRST not in collector.told
