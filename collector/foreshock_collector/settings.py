"""Dataclass fields that carry their documentation: for --help, error messages and docs/configuration.md."""

from __future__ import annotations

from dataclasses import Field, field
from typing import Any


def setting(default: Any, doc: str, *, least: float | None = None, most: float | None = None) -> Any:
    """Declare a field of a dataclass. least, most: the range of a number, both or neither."""
    return field(default=default, metadata={"doc": doc, "range": None if least is None else (least, most)})


def doc_of(declared: Field[Any]) -> str:
    """Return what the setting does, in one sentence."""
    return str(declared.metadata.get("doc", ""))


def range_of(declared: Field[Any]) -> tuple[float, float] | None:
    """Return the least and the greatest value of a number; None for anything else."""
    found: tuple[float, float] | None = declared.metadata.get("range")
    return found
