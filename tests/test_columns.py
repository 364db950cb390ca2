"""The table of columns against what follows from it: the contract, the ring, the recorder, the collector's gauges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from foreshock_collector.catalogue import CATALOGUE, COLUMN_GAUGES, LAYER_WEIGHTS
from foreshock_collector.records.batch import RECORD, SUMS, ColumnsError, decode, nonfinite_mask
from foreshock_protos.columns import (
    COLUMNS,
    MEASURED_NAMES,
    NONFINITE_COUNTS,
    NONFINITE_VALUES,
    REDUCED_NAMES,
    WEIGHT_BLOCKS,
    WIRE_COLUMNS,
    WIRE_NAMES,
    Column,
)
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder import layout
from foreshock_recorder.batches import BatchPacker, is_nonfinite
from foreshock_recorder.records import Record

NOT_COLUMNS = {
    *("instance", "first_sequence", "dropped", "backward_passes"),
    *("global_layer_norms", "local_layer_norms", "weight_rows", *WEIGHT_BLOCKS),
}
"""Fields of `StepBatch` that are of the batch, or a block with a value for each layer."""
OPTIONAL = [column for column in WIRE_COLUMNS if column.optional]
REQUIRED = [column for column in WIRE_COLUMNS if not column.optional and column.name != "step"]


def record(sequence: int, measured: Mapping[str, float] | None = None, *, loss: float | None = 1.0) -> Record:
    values = [(measured or {}).get(name, 0.0) for name in MEASURED_NAMES]
    return Record(
        sequence=sequence,
        step=sequence,
        wall_seconds=0.0,
        monotonic_seconds=0.0,
        learning_rate=0.0,
        flags=0,
        measured=memoryview(np.array(values).tobytes()).cast("d"),
        weights=None,
        observed=True,
        loss=loss,
    )


def packed(*records: Record) -> pb.StepBatch:
    packer = BatchPacker("r-0", rank=0, layers=0, local_norms=True)
    return packer.pack(records[0].sequence, list(records), {}, backward_passes=0).steps


def test_the_contract_has_a_field_for_each_column_and_no_other() -> None:
    fields = {field.name for field in pb.StepBatch.DESCRIPTOR.fields}
    assert fields - NOT_COLUMNS == set(WIRE_NAMES)
    assert len(set(WIRE_NAMES)) == len(WIRE_NAMES)


def test_the_all_reduces_columns_come_last_in_the_ring() -> None:
    assert MEASURED_NAMES[-len(REDUCED_NAMES) :] == REDUCED_NAMES


def test_the_ring_numbers_exit_reasons_and_flags_as_the_contract_does() -> None:
    reasons = {reason.name: int(reason) for reason in layout.ExitReason if reason}
    assert reasons == {name: number for name, number in pb.ExitReason.items() if number}
    assert (layout.EDITED, layout.NOT_STEPPED, layout.GRADIENT_UNKNOWN) == (
        pb.EDITED,
        pb.NOT_STEPPED,
        pb.GRADIENT_UNKNOWN,
    )


def test_every_column_arrives_as_the_ring_held_it() -> None:
    values = {name: float(i + 1) for i, name in enumerate(MEASURED_NAMES)} | {"reduced_sequence": 1.0}
    records = decode(packed(record(1, values)), 0)
    (row,), (sums,) = records.rows, records.sums
    arrived = {name: row[name] for name in RECORD.names or ()} | {name: sums[name] for name in SUMS.names or ()}
    sent = {name: value for name, value in values.items() if name in WIRE_NAMES}
    assert {name: arrived[name] for name in sent} == sent


@pytest.mark.parametrize("column", OPTIONAL, ids=lambda column: column.name)
def test_a_batch_of_a_recorder_that_does_not_know_an_optional_column_is_taken(column: Column) -> None:
    batch = packed(record(1, {column.name: 7.0}), record(2, {column.name: 7.0}))
    batch.ClearField(column.name)
    assert decode(batch, 0).rows[column.name].tolist() == [column.missing] * 2


@pytest.mark.parametrize("column", REQUIRED, ids=lambda column: column.name)
def test_a_batch_without_a_required_column_is_refused(column: Column) -> None:
    batch = packed(record(1))
    batch.ClearField(column.name)
    with pytest.raises(ColumnsError, match=f"column {column.name} has 0 rows"):
        decode(batch, 0)


@pytest.mark.parametrize("column", OPTIONAL, ids=lambda column: column.name)
def test_a_batch_with_a_part_of_an_optional_column_is_refused(column: Column) -> None:
    batch = packed(record(1), record(2))
    del getattr(batch, column.name)[1:]
    with pytest.raises(ColumnsError, match=f"column {column.name} has 1 rows"):
        decode(batch, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, bad) for name in NONFINITE_VALUES for bad in (math.nan, math.inf)),
        *((n, 1.0) for n in NONFINITE_COUNTS),
    ],
)
def test_recorder_and_collector_agree_on_what_is_nonfinite(name: str, value: float) -> None:
    bad = record(2, loss=value) if name == "loss" else record(2, {name: value})
    records = [record(1), bad, record(3, loss=None)]
    assert [is_nonfinite(each) for each in records] == [False, True, False]
    assert nonfinite_mask(decode(packed(*records), 0).rows).tolist() == [False, True, False]


def test_every_column_with_a_gauge_has_its_series_in_the_catalogue() -> None:
    gauges = {column.name: column.gauge.series for column in COLUMNS if column.gauge is not None}
    assert {name: series.name for name, series in COLUMN_GAUGES.items()} == gauges
    assert set(gauges.values()) <= {series.name for series in CATALOGUE}


def test_every_block_of_the_weights_has_its_series_in_the_catalogue() -> None:
    assert tuple(LAYER_WEIGHTS) == WEIGHT_BLOCKS
    assert set(LAYER_WEIGHTS.values()) <= set(CATALOGUE)


LAYERS = 2


def record_with_layers(sequence: int, *, weights: bool) -> Record:
    gradients = [0.0] * len(MEASURED_NAMES) + [10.0 * sequence + i for i in range(2 * LAYERS)]
    blocks = [100.0 * sequence + i for i in range(len(WEIGHT_BLOCKS) * LAYERS)]
    return replace(
        record(sequence),
        measured=memoryview(np.array(gradients).tobytes()).cast("d"),
        weights=memoryview(np.array(blocks).tobytes()).cast("d") if weights else None,
    )


def batch_of(rank: int, *, local_norms: bool = True) -> pb.StepBatch:
    """Three records; the first and the last measure the weights."""
    packer = BatchPacker("r-0", rank=rank, layers=LAYERS, local_norms=local_norms)
    records = [record_with_layers(sequence, weights=sequence != 8) for sequence in (7, 8, 9)]
    return packer.pack(7, records, {}, backward_passes=0).steps


def test_blocks_of_the_weights_arrive_for_the_steps_that_measured_them() -> None:
    decoded = decode(batch_of(0), LAYERS)
    assert decoded.weights.sequences.tolist() == [7, 9]
    for name in WEIGHT_BLOCKS:
        first = WEIGHT_BLOCKS.index(name) * LAYERS
        expected = [[100.0 * sequence + first, 100.0 * sequence + first + 1] for sequence in (7, 9)]
        assert decoded.weights.block(name).tolist() == expected
    assert decoded.layer_norms is not None and decoded.layer_norms.tolist() == [[70, 71], [80, 81], [90, 91]]


def test_one_rank_sends_what_all_ranks_share() -> None:
    batch = batch_of(1)
    assert not batch.weight_rows and not any(getattr(batch, name) for name in WEIGHT_BLOCKS)
    assert not batch.global_layer_norms and len(batch.local_layer_norms) == 3 * LAYERS
    assert not batch_of(1, local_norms=False).local_layer_norms


def test_a_batch_of_a_recorder_that_does_not_know_the_weights_blocks_is_taken() -> None:
    batch = batch_of(0)
    for name in ("weight_rows", *WEIGHT_BLOCKS):
        batch.ClearField(name)
    assert not len(decode(batch, LAYERS).weights.sequences)


@pytest.mark.parametrize("rows", [[1, 0], [1, 1], [0, 3]])
def test_rows_of_the_weights_that_are_not_of_the_batch_or_not_in_order_are_refused(rows: list[int]) -> None:
    batch = batch_of(0)
    batch.weight_rows[:] = rows
    with pytest.raises(ColumnsError, match="weight_rows must ascend"):
        decode(batch, LAYERS)


@pytest.mark.parametrize("name", WEIGHT_BLOCKS)
def test_a_block_of_the_weights_that_is_short_is_refused(name: str) -> None:
    batch = batch_of(0)
    del getattr(batch, name)[1:]
    with pytest.raises(ColumnsError, match=f"{name} has 1 values, not 2 rows of 2 layers"):
        decode(batch, LAYERS)


def test_pieces_of_a_batch_have_the_weights_of_their_own_steps() -> None:
    decoded = decode(batch_of(0), LAYERS)
    assert decoded.above(7).weights.sequences.tolist() == [9]
    assert [piece.weights.sequences.tolist() for piece in decoded.slices(2)] == [[7], [9]]
