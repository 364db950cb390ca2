"""Steps that are assembled in blocks equal those that a plain reading of the records gives, one by one."""

from __future__ import annotations

import math
import random
from statistics import fmean, median

import numpy as np
import pytest

from foreshock_collector.analysis.step_signals import signals_of
from foreshock_collector.records.batch import RECORD, SUMS, Records, Rows
from foreshock_collector.records.buffer import RecordBuffer
from foreshock_collector.records.layer_weights import LayerWeights
from foreshock_protos.v1 import telemetry_pb2 as pb

FLAGS = (
    pb.INCOMPLETE, pb.LOSS_OBSERVED, pb.LOCAL_NORMS, pb.NOT_STEPPED, pb.GRADIENT_UNKNOWN, pb.SKIPPED,
    pb.SHADOW_CLIPPED, pb.SHADOW_SKIPPED,
)  # fmt: skip
STEPS = 60


def any_number(chance: random.Random) -> float:
    return chance.choice((0.0, 1.0, chance.random(), -chance.random(), math.nan, math.inf, -math.inf, 1e150))


def records_of(chance: random.Random) -> tuple[Rows, Rows]:
    """Records of one rank, some of them missing, and the sums of some steps."""
    rows = np.zeros(STEPS, RECORD)
    for name in RECORD.names or ():
        rows[name] = [chance.choice((-1, 0, 1)) if RECORD[name].kind == "i" else any_number(chance) for _ in rows]
    rows["sequence"] = np.arange(1, STEPS + 1)
    rows["monotonic_seconds"] = [i + chance.choice((0.0, 0.5, -2.0, math.inf)) for i in range(STEPS)]
    rows["flags"] = [sum(f for f in FLAGS if chance.random() < (0.7 if f == pb.LOSS_OBSERVED else 0.1)) for _ in rows]
    sums = np.zeros(STEPS // 2, SUMS)
    for name in SUMS.names or ():
        sums[name] = [chance.choice((0, 1, 2)) for _ in sums]
    sums["reduced_sequence"] = np.arange(1, len(sums) + 1)
    keep = np.array([chance.random() < 0.8 for _ in rows])
    keep[-1] = True
    return rows[keep], sums


def expected(sequence: int, ranks: list[Rows], sums: Rows, world_size: int) -> dict[str, object] | None:
    """What must be in a step, by the definition of each of its fields."""
    at = [rows[rows["sequence"] == sequence] for rows in ranks]
    found = [row[0] for row in at if len(row) and not row[0]["flags"] & pb.INCOMPLETE]
    if not found:
        return None
    known = [row for row in found if not row["flags"] & pb.GRADIENT_UNKNOWN]
    first = (known or found)[0]
    losses = [float(row["loss"]) for row in found if row["flags"] & pb.LOSS_OBSERVED]
    summed = [s for s in sums if s["reduced_sequence"] == sequence and len(found) < world_size]
    nan = any(map(math.isnan, losses)) or any(s["reduced_nan_losses"] > 0 for s in summed)
    inf = any(map(math.isinf, losses)) or any(s["reduced_inf_losses"] > 0 for s in summed)
    loss = fmean(losses) if losses and not (nan or inf) else None
    for s in summed:
        if s["reduced_loss_count"] > len(losses):
            loss = float(s["reduced_loss_sum"] / s["reduced_loss_count"])
    loss = (math.nan if nan else math.inf) if nan or inf else loss
    norm = float(first["global_norm"]) if known else math.nan

    def counted(kind: str) -> bool:
        return any(row[f"{where}_{kind}_parameters"] > 0 for row in found for where in ("global", "local"))

    return {
        "sequence": sequence,
        "ranks": len(found),
        "step": int(first["step"]),
        "learning_rate": float(first["learning_rate"]),
        "loss": loss,
        "nan_loss": nan,
        "inf_loss": inf,
        "global_norm": norm,
        "nan_gradient": counted("nan") or (bool(known) and math.isnan(norm)),
        "inf_gradient": counted("inf") or math.isinf(norm),
        "stepped": not first["flags"] & pb.NOT_STEPPED,
        "skipped": bool(first["flags"] & pb.SKIPPED),
        "shadow_clipped": bool(first["flags"] & pb.SHADOW_CLIPPED),
        "shadow_skipped": bool(first["flags"] & pb.SHADOW_SKIPPED),
    }


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("seed", range(8))
def test_a_step_holds_what_its_records_say(world_size: int, seed: int) -> None:
    chance = random.Random(100 * world_size + seed)
    buffer, ranks = RecordBuffer(world_size=world_size, layers=0), []
    for rank in range(world_size):
        rows, sums = records_of(chance)
        ranks.append(rows)
        if rank:
            sums = sums[:0]
        else:
            all_sums = sums
        buffer.write(rank, Records(rows=rows, sums=sums, layer_norms=None, weights=LayerWeights.empty(0)), 0.0)
    steps = {step.sequence: step for step in buffer.finalize(0, STEPS)}
    for sequence in range(1, STEPS + 1):
        wanted = expected(sequence, ranks, all_sums, world_size)
        again = buffer.assembled_again(0, sequence)
        if wanted is None:
            assert again is None
        elif again is None:
            # Gradients that were dropped by design.
            assert not (wanted["stepped"] or wanted["nan_loss"] or wanted["inf_loss"] or wanted["nan_gradient"])
            assert not wanted["inf_gradient"] and wanted["loss"] is None
        else:
            loss = wanted.pop("loss")
            assert again.loss is None if loss is None else again.loss == pytest.approx(loss, rel=1e-12, nan_ok=True)
            # As text, where NaN equals NaN.
            assert str({name: getattr(again, name) for name in wanted}) == str(wanted)
            assert str(again) == str(steps[sequence])
        assert (again is None) == (sequence not in steps)


def test_the_duration_of_a_step_is_the_time_since_the_step_before_by_one_rank() -> None:
    rows = np.zeros(4, RECORD)
    rows["sequence"], rows["monotonic_seconds"] = (1, 2, 4, 5), (10.0, 10.5, 12.0, 11.0)
    buffer = RecordBuffer(world_size=1, layers=0)
    buffer.write(0, Records(rows=rows, sums=np.zeros(0, SUMS), layer_norms=None, weights=LayerWeights.empty(0)), 0.0)
    # Unknown at the first, after a gap, and where a clock went back.
    assert [step.duration_seconds for step in buffer.finalize(0, 5)] == [None, 0.5, None, None]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6, 7])
def test_the_largest_local_norm_is_compared_with_the_median_of_the_others(world_size: int) -> None:
    chance = random.Random(world_size)
    norms = np.array([[chance.choice((0.0, 1.0, chance.random())) for _ in range(world_size)] for _ in range(STEPS)])
    norms[3, -1], norms[4, 0] = math.nan, math.inf
    buffer = RecordBuffer(world_size=world_size, layers=0)
    for rank in range(world_size):
        rows = np.zeros(STEPS, RECORD)
        rows["sequence"], rows["flags"], rows["local_norm"] = np.arange(1, STEPS + 1), pb.LOCAL_NORMS, norms[:, rank]
        rows["global_norm"] = 1.0
        sums = np.zeros(0, SUMS)
        buffer.write(rank, Records(rows=rows, sums=sums, layer_norms=None, weights=LayerWeights.empty(0)), 0.0)
    steps = list(buffer.finalize(0, STEPS))
    assert len(steps) == STEPS
    known = 0
    for found, each in zip(signals_of(buffer, steps), norms.tolist(), strict=True):
        largest = each.index(max(each))
        others = each[:largest] + each[largest + 1 :]
        if all(map(math.isfinite, each)) and others and median(others) > 0:
            known += 1
            assert (found.largest_rank, found.largest_ratio) == (largest, max(each) / median(others))
        else:
            assert found.largest_rank == -1 and math.isnan(found.largest_ratio)
    assert (known > 0) == (world_size > 1)


def test_the_weakest_layer_is_the_one_with_the_smallest_norm_that_is_not_zero() -> None:
    norms = [[0.5, 0.25, 1.0], [0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [math.nan, 1.0, 2.0], [3.0, math.inf, 2.0], [0, 4, 0]]
    rows = np.zeros(len(norms), RECORD)
    rows["sequence"], rows["global_norm"] = np.arange(1, len(norms) + 1), 1.0
    weights, sums = LayerWeights.empty(3), np.zeros(0, SUMS)
    buffer = RecordBuffer(world_size=1, layers=3)
    buffer.write(0, Records(rows=rows, sums=sums, layer_norms=np.array(norms, "f4"), weights=weights), 0.0)
    found = signals_of(buffer, list(buffer.finalize(0, len(norms))))
    assert [each.weakest_layer for each in found] == [1, 2, -1, -1, -1, 1]
    assert [each.weakest_ratio for each in found if each.weakest_layer >= 0] == [0.25, 0.5, 1.0]
    assert all(math.isnan(each.weakest_ratio) for each in found if each.weakest_layer < 0)
    assert all(math.isnan(each.agreement) and math.isnan(each.spread) for each in found)
