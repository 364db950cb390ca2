"""Verdicts on made-up steps, which go through the detector as live ones do."""

from __future__ import annotations

import math
import random
from typing import Any

from foreshock_collector.analysis.detection import Detector, Event
from foreshock_collector.analysis.diagnosis import diagnose
from foreshock_collector.analysis.verdicts import Verdict
from foreshock_collector.records.buffer import RecordBuffer
from foreshock_collector.records.steps import ModelFacts, Step

PLAIN = ModelFacts(type="Net", module_types={"Linear": 2, "LayerNorm": 1}, layers=("a", "b"))


def quiet(count: int = 100, **changes: Any) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [{"norm": math.exp(rng.gauss(0, 0.1)), "loss": 2.0 + 0.01 * rng.random()} | changes for _ in range(count)]


def climb() -> list[dict[str, Any]]:
    return [{"norm": 4.0**i, "loss": 2.0} for i in range(1, 7)]


def verdict(
    records: list[dict[str, Any]], *, model: ModelFacts = PLAIN, buffer: RecordBuffer | None = None, apart: float = 1
) -> Verdict:
    """On the last record."""
    detector, made, events = Detector(), list[Step](), list[Event]()
    for sequence, record in enumerate(records, 1):
        norm, loss = record["norm"], record["loss"]
        step = Step(
            attempt=0,
            sequence=sequence,
            step=sequence - 1,
            wall_seconds=0.0,
            duration_seconds=None,
            learning_rate=record.get("rate", 0.1),
            loss=loss,
            loss_scale=record.get("scale", 1.0),
            global_norm=norm,
            clip_coefficient=record.get("clip", 1.0),
            skipped=False,
            nan_loss=loss is not None and math.isnan(loss),
            inf_loss=loss is not None and math.isinf(loss),
            nan_gradient=math.isnan(norm),
            inf_gradient=math.isinf(norm),
            ranks=1,
            measurements=record.get("measured", {}),
        )
        made.append(step)
        known = (detector.finite_ever, detector.climbing)
        where: dict[str, Any] = {"attempt": 0, "sequence": sequence, "step": step.step}
        bad = len(step.nonfinite)
        events += detector.update(norm=norm, loss=loss, nonfinite=bad, skipped=step.overflow, **where)
    buffer = buffer or RecordBuffer(world_size=1, layers=len(model.layers))
    return diagnose(made, events, buffer, model, finite_before=known[0], climbing=known[1], apart=apart)
