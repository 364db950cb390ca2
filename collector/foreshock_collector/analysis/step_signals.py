"""Computes what the ranks and layers of a step show together: how alike the ranks are, and the weakest layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foreshock_collector.records.batch import Rows
from foreshock_collector.records.buffer import RecordBuffer
from foreshock_collector.records.steps import Step


class StepSignals(NamedTuple):
    """Signals from the ranks and layers of one step."""

    agreement: float
    """|mean gradient|^2 over the mean of |local gradient|^2, at least 1 over the world size; NaN if unknown."""
    spread: float
    """Difference of the largest and smallest local norm, over the largest; NaN if unknown."""
    weakest_layer: int
    """Layer with the smallest nonzero norm; -1 if unknown. A layer without a gradient is frozen."""
    weakest_ratio: float
    """Smallest nonzero norm of a layer over the largest."""
    largest_rank: int = -1
    """Rank with the largest local norm; -1 if unknown."""
    largest_ratio: float = math.nan
    """Largest local norm over the median of the others'."""
    divergent_ranks: tuple[int, ...] | None = None
    """Ranks whose weights differ from the majority's; None if unknown, or not compared on this step."""


def signals_of(buffer: RecordBuffer, steps: Sequence[Step]) -> list[StepSignals]:
    """Return the signals of these steps, in order."""
    sequences = np.array([step.sequence for step in steps], np.int64)
    norms = np.array([step.global_norm for step in steps])
    local = buffer.local_norms(sequences)
    layers = buffer.layer_norms_of(sequences)
    compared = buffer.compared(sequences).tolist() if local.shape[1] > 1 else [False] * len(steps)
    divergent_ranks = [
        _divergent(*buffer.records(step.sequence)) if all_known else None
        for step, all_known in zip(steps, compared, strict=True)
    ]
    with np.errstate(all="ignore"):
        signals = (*_likeness(local, norms), *_weakest(layers), *_largest(local))
    return [StepSignals(*each) for each in zip(*signals, divergent_ranks, strict=True)]


def _likeness(local: NDArray[np.float64], norms: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Return agreement and spread of each step. local: [steps, ranks]. norms: of the averaged gradient, [steps]."""
    steps, ranks = local.shape
    if ranks < 2:
        return [math.nan] * steps, [math.nan] * steps
    largest = local.max(axis=1)
    agreements = 1 / np.square(local / norms[:, None]).mean(axis=1)
    return agreements.tolist(), ((largest - local.min(axis=1)) / largest).tolist()


def _weakest(layers: NDArray[np.float64]) -> tuple[list[int], list[float]]:
    """Return the layer with the smallest nonzero norm of each step, and what part of the largest that is.

    layers: norms, [steps, layers].
    """
    steps, count = layers.shape
    if count < 2:
        return [-1] * steps, [math.nan] * steps
    positive = np.where(layers > 0, layers, math.inf)
    smallest, largest = positive.min(axis=1), layers.max(axis=1)
    known = np.isfinite(layers).all(axis=1) & (largest > 0)
    places = np.where(known, positive.argmin(axis=1), -1)
    return places.tolist(), np.where(known, smallest / largest, math.nan).tolist()


def _largest(norms: NDArray[np.float64]) -> tuple[list[int], list[float]]:
    """Return the rank with the largest norm of each step, and how many times the median of the others' that is.

    norms: [steps, ranks].
    """
    steps, ranks = norms.shape
    if ranks < 2:
        return [-1] * steps, [math.nan] * steps
    ordered = np.sort(norms, axis=1)
    # The middle of all but the last, or its two middle ones.
    others = ordered[:, (ranks - 2) // 2 : (ranks - 1) // 2 + 1].mean(axis=1)
    known = np.isfinite(norms).all(axis=1) & (others > 0)
    ratios = np.where(known, ordered[:, -1] / others, math.nan)
    return np.where(known, norms.argmax(axis=1), -1).tolist(), ratios.tolist()


def _divergent(ranks: NDArray[np.int64], rows: Rows) -> tuple[int, ...] | None:
    """Return the ranks whose fingerprint is not that of the majority; if two ranks differ, both."""
    prints = rows["parameter_fingerprint"]
    if (rows["step"] != rows["step"][0]).any():
        # A rank that observes more often than the others numbers its steps differently: the weights are not comparable.
        return None
    values, counts = np.unique(prints, return_counts=True)
    most = counts == counts.max()
    usual = values[most] if most.sum() == 1 else values[:0]
    return tuple(ranks[~np.isin(prints, usual)].tolist())
