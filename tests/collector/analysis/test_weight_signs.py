"""What the weights add to the evidence of an explosion, and when they add nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest

from foreshock_collector.records.batch import decode
from foreshock_collector.records.buffer import RecordBuffer
from tests.support.diagnosed_steps import PLAIN, climb, quiet, verdict
from tests.support.streams import steps

BAD = {"norm": math.nan, "loss": math.nan}
ONSET = 101
"""Sequence number of the first step of the climb, after a hundred quiet ones."""


def weights_evidence(records: list[dict[str, Any]], buffer: RecordBuffer | None = None) -> list[str]:
    """Lines of the verdict that are about updates or moments."""
    found = verdict(records, buffer=buffer)
    assert found.cause == "exploding_gradients"
    return [line for line in found.evidence if "update" in line or "moment" in line]


def measured(records: list[dict[str, Any]], name: str, values: dict[int, float]) -> list[dict[str, Any]]:
    """The records with a measurement on some of them, by sequence number."""
    return [
        record | {"measured": record.get("measured", {}) | ({name: values[i]} if i in values else {})}
        for i, record in enumerate(records, 1)
    ]


def usual(every: int = 10) -> dict[int, float]:
    return dict.fromkeys(range(11, ONSET, every), 0.001)


def explosion() -> list[dict[str, Any]]:
    return [*quiet(), *climb(), BAD]


def test_an_update_ratio_that_rose_in_the_climb_is_told_with_the_step_that_made_it() -> None:
    # The record of step 104, by its label, holds the update of step 103.
    (line,) = weights_evidence(measured(explosion(), "update_ratio", usual() | {105: 0.008}))
    assert line == "the update ratio rose 8-fold, from about 0.001 to 0.008 at step 103"


def test_an_update_ratio_that_rose_before_the_first_sign_says_how_early() -> None:
    (line,) = weights_evidence(measured(explosion(), "update_ratio", usual() | {99: 0.003, 105: 0.008}))
    assert line.endswith("; it had risen 3 steps before the first sign")


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="nothing measured"),
        pytest.param({11: 0.001, 105: 0.008}, id="too little to compare with"),
        pytest.param(usual() | {105: 0.0015}, id="as before"),
        pytest.param(usual() | {95: 0.008, 105: 0.001}, id="calm again"),
        pytest.param(usual() | {105: math.nan}, id="not finite"),
        pytest.param({11: -0.001, 21: 0.001, 31: -0.001, 41: 0.001, 105: 0.008}, id="negative"),
    ],
)
def test_an_update_ratio_that_did_not_rise_or_is_not_known_is_not_told(values: dict[int, float]) -> None:
    assert weights_evidence(measured(explosion(), "update_ratio", values)) == []


def buffer_with(ratios: dict[int, list[float]]) -> RecordBuffer:
    buffer = RecordBuffer(world_size=1, layers=2)
    for sequence in range(1, len(explosion()) + 1):
        blocks: dict[str, Any] = {}
        if sequence in ratios:
            blocks = {"weight_rows": [0], "update_layer_ratios": ratios[sequence]}
        buffer.write(0, decode(steps(sequence, [1.0], **blocks).steps, 2), now=0.0)
    return buffer


@pytest.mark.parametrize("late", [[0.002, 0.03], [math.inf, 0.03], [0.0, 0.03]])
def test_the_layer_whose_updates_grew_most_is_told(late: list[float]) -> None:
    records = measured(explosion(), "update_ratio", usual() | {105: 0.008})
    layers = {sequence: [0.001, 0.003] for sequence in usual()} | {105: late}
    lines = weights_evidence(records, buffer_with(layers))
    assert lines[1:] == [f"the updates of layer {PLAIN.layers[1]} grew most: 10 times their earlier ratio"]


def test_a_layer_without_a_history_is_not_told() -> None:
    records = measured(explosion(), "update_ratio", usual() | {105: 0.008})
    assert len(weights_evidence(records, buffer_with({105: [0.002, 0.03]}))) == 1


def test_a_gradient_far_above_the_second_moment_is_told_beside_what_is_usual() -> None:
    records = measured(
        [*quiet(), {"norm": 8.0, "loss": 2.0}, *climb()[1:], BAD], "second_moment_norm", dict.fromkeys(usual(), 0.5)
    )
    (line,) = weights_evidence(records)
    assert line.startswith(
        "the gradient norm at step 100 was 16 times the root of the optimizer's second moment, usually "
    )


def test_a_gradient_that_was_clipped_to_the_usual_size_has_not_outrun_the_second_moment() -> None:
    peak = {"norm": 8.0, "loss": 2.0, "clip": 0.125}
    records = measured([*quiet(), peak, *climb()[1:], BAD], "second_moment_norm", dict.fromkeys(usual(), 0.5))
    assert weights_evidence(records) == []
