"""Gaps in the sequence numbers of a rank's records: each is its first and last number, and gaps ascend."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Gap = tuple[int, int]
Sequences = NDArray[np.int64]


def in_gaps(gaps: Sequence[Gap], sequences: Sequences) -> NDArray[np.bool_]:
    """Return which sequence numbers lie in a gap."""
    inside = np.zeros(sequences.shape, np.bool_)
    for first, last in gaps:
        inside |= (sequences >= first) & (sequences <= last)
    return inside


def gaps_after(gaps: Sequence[Gap], position: int, sequences: Sequences) -> list[Gap]:
    """Return the gaps that are left, and those that are new, once these records have come.

    position: the highest sequence number before them. sequences: theirs, ascending.
    """
    left = [part for gap in gaps for part in _parts(gap[0] - 1, sequences, gap[1] + 1)]
    new = sequences[sequences > position]
    if len(new) and int(new[-1]) - position > len(new):
        left += _parts(position, new, int(new[-1]) + 1)
    return left


def count_up_to(gaps: Sequence[Gap], upto: int) -> tuple[int, list[Gap]]:
    """Return how many missing sequence numbers are not above a number, and the gaps above it."""
    count = sum(min(last, upto) - first + 1 for first, last in gaps if first <= upto)
    return count, [(max(first, upto + 1), last) for first, last in gaps if last > upto]


def _parts(before: int, sequences: Sequences, after: int) -> list[Gap]:
    """Return the gaps between two numbers, of which neither is in a gap."""
    inside = sequences[(sequences > before) & (sequences < after)].tolist()
    return [(one + 1, two - 1) for one, two in pairwise([before, *inside, after]) if two - one > 1]
