"""How state is stored: dataclasses as MessagePack maps, by the names of their fields. NaN and Inf survive.

A field that is missing takes its default and one that is unknown is ignored, so a new field with a default needs no
migration; whatever else changes the layout does (migrations.py).
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
import numpy as np

_T = TypeVar("_T")


def encode(value: object) -> bytes:
    """Encode a dataclass. Of a subclass that is none itself, the fields of its base. Raises `TypeError`."""
    return _encoder.encode(value)


def decode(data: bytes, kind: type[_T]) -> _T:
    """Decode what `encode` made of this dataclass. Raises `msgspec.MsgspecError`."""
    return msgspec.msgpack.decode(data, type=kind)


def _plain(value: object) -> object:
    # A numpy number is a float to the type checker, and none to msgspec.
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be stored")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
