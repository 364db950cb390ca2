"""What survives being stored, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest

from foreshock_collector.state.encoding import decode, encode


@dataclass(frozen=True)
class Inner:
    number: float


@dataclass
class Outer:
    inner: Inner | None = None
    numbers: list[float] = field(default_factory=list)
    names: tuple[str, ...] = ()


class InMemory(Outer):
    """Adds what must not be stored."""

    def __init__(self) -> None:
        super().__init__(names=("a",))
        self.lock = object()


def test_numbers_survive_whatever_they_are() -> None:
    numbers = [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e308]
    found = decode(encode(Outer(inner=Inner(math.inf), numbers=numbers, names=("a", "b"))), Outer)
    assert list(map(repr, found.numbers)) == list(map(repr, numbers))
    assert (found.inner, found.names) == (Inner(math.inf), ("a", "b"))


def test_a_numpy_number_is_stored_as_a_plain_one() -> None:
    found = decode(encode(Outer(numbers=[np.float64(0.5), np.float32(0.25)])), Outer)  # type: ignore[list-item]
    assert [(type(number), number) for number in found.numbers] == [(float, 0.5), (float, 0.25)]


def test_of_a_subclass_only_the_state_is_stored() -> None:
    assert encode(InMemory()) == encode(Outer(names=("a",)))


def test_a_field_may_be_added_or_dropped_and_may_not_change_its_type() -> None:
    assert decode(encode({"names": ["a"], "gone": 1}), Outer) == Outer(names=("a",))
    with pytest.raises(msgspec.ValidationError, match=r"\.inner\.number"):
        decode(encode({"inner": {"number": "a lot"}}), Outer)
    with pytest.raises(msgspec.ValidationError, match="number"):
        decode(encode({"inner": {}}), Outer)


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(TypeError, match="object cannot be stored"):
        encode(Outer(numbers=[object()]))  # type: ignore[list-item]
