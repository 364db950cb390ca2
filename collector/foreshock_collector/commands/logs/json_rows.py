"""Reads JSON: an object per line, a list, an object of columns, or the state of Hugging Face's Trainer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from foreshock_collector.commands.logs.columns import Chunk, ColumnBuilder, Floats, LogError
from foreshock_collector.commands.logs.names import Names
from foreshock_collector.commands.logs.source import Source, lines_of

_decoder = msgspec.json.Decoder()


class ObjectRows:
    """Holds consecutive rows, each a JSON object."""

    def __init__(self, rows: list[dict[str, Any]], first: int, unit: str = "line") -> None:
        """first: number of the first one. unit: what `first` counts."""
        self.fields = list(dict.fromkeys(chain.from_iterable(rows)))
        self._rows, self._first, self._unit = rows, first, unit

    def column(self, name: str) -> Sequence[Any]:
        """Return one value of each object; None where it has no such key."""
        return [row.get(name) for row in self._rows]

    def empty(self, row: int, names: Names) -> bool:
        """Return whether an object has a key for the loss or the norm."""
        return names.loss in self._rows[row] or names.norm in self._rows[row]

    def where(self, row: int) -> str:
        """Return the number of an object."""
        return f"{self._unit} {self._first + row}"


class AlikeRows:
    """Holds consecutive rows, JSON objects that all have the keys of the first."""

    def __init__(self, layout: _Layout, rows: list[Any], first: int) -> None:
        """first: number of the first row."""
        self.fields = layout.fields
        self._numeric, self._rows, self._first = layout.numeric, rows, first

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, name: str) -> Sequence[Any] | Floats:
        """Return one value of each object; None where there is no such key."""
        if name not in self.fields:
            return [None] * len(self)
        place = self.fields.index(name)
        values = map(attrgetter(_attribute(place)), self._rows)
        return np.fromiter(values, float, len(self)) if self._numeric[place] else list(values)

    def empty(self, row: int, names: Names) -> bool:  # noqa: ARG002
        """Return whether an object has a key for the loss or the norm."""
        return names.loss in self.fields or names.norm in self.fields

    def where(self, row: int) -> str:
        """Return the number of an object."""
        return f"line {self._first + row}"


class _Layout:
    """Decodes lines that are all like a first one: objects with the same keys, and numbers where it has numbers.

    No object is made a dictionary, which takes half of the time of reading a log.
    """

    def __init__(self, line: dict[str, Any]) -> None:
        """Raises `ValueError` for keys that cannot be fields."""
        self.fields = list(line)
        self.numeric = [type(value) in (int, float) for value in line.values()]
        kinds: list[tuple[str, Any]] = [
            (_attribute(i), float if number else Any) for i, number in enumerate(self.numeric)
        ]
        names = {_attribute(i): field for i, field in enumerate(self.fields)}
        row = msgspec.defstruct("Row", kinds, rename=names, forbid_unknown_fields=True, gc=False)
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(row)

    def decode(self, block: str) -> list[Any] | None:
        """Return the objects; None if one of them is not like the first, or torn."""
        try:
            return self._decoder.decode_lines(block)
        except (msgspec.DecodeError, RecursionError):
            return None


def is_json(text: str) -> bool:
    """Return whether the text begins with a JSON object, or with a list of objects."""
    begin = "".join(text[:4096].split())
    return begin.startswith(('{"', "{}", '[{"', "[]"))


def read_json(source: Source, builder: ColumnBuilder) -> Iterator[Chunk]:
    """Yield the rows. Raises `LogError`."""
    first_line = source.text.lstrip().partition("\n")[0].strip()
    if first_line.startswith("{") and first_line.endswith("}") and not _is_document(first_line):
        yield from _lines(source, builder, _layout_of(first_line))
        return
    text = source.whole()
    try:
        whole = decoded(text)
    except json.JSONDecodeError as error:
        if "\n" not in text.strip():
            raise LogError(f"{source.path}: {error}") from error
        yield from _spread_lines(text, builder)
        return
    yield from _document(source, whole, builder)


def _document(source: Source, whole: Any, builder: ColumnBuilder) -> Iterator[Chunk]:
    if isinstance(whole, dict) and "log_history" in whole:
        whole = whole["log_history"]
        builder.names.add(["log_history"])
        if not isinstance(whole, list):
            raise LogError(f"{source.path}: log_history is not a list")
    elif isinstance(whole, dict):
        whole = _transposed(whole)
    yield ObjectRows([row for row in whole if isinstance(row, dict)], 0, "entry")


def _lines(source: Source, builder: ColumnBuilder, layout: _Layout | None) -> Iterator[Chunk]:
    number = 1
    for block in source.blocks():
        alike = None if layout is None else layout.decode(block)
        if layout is not None and alike is not None:
            yield AlikeRows(layout, alike, number)
            number += block.count("\n")
            continue
        # One row that differs is seldom the only one.
        layout = None
        rows: list[dict[str, Any]] = []
        try:
            found = _decoder.decode_lines(block)
        except (msgspec.DecodeError, RecursionError):
            found = [_object(source, line, number + i, builder) for i, line in enumerate(lines_of(block))]
            if not source.complete and found[-1] is None:
                # A torn last line is how a killed script, or one that still writes, leaves its log.
                builder.unread_lines -= 1
        rows = [row for row in found if isinstance(row, dict)]
        if rows:
            yield ObjectRows(rows, number)
        number += block.count("\n")


def _layout_of(line: str) -> _Layout | None:
    try:
        return _Layout(_decoder.decode(line))
    except (msgspec.DecodeError, AttributeError, TypeError, ValueError, RecursionError):
        return None


def _attribute(place: int) -> str:
    """Return the attribute that holds the value of a key. place: of the key in the first row."""
    return f"value_{place}"


def _object(source: Source, line: str, number: int, builder: ColumnBuilder) -> Any:
    """Return what a line holds; None if it is empty, torn, or of something else."""
    if not line.strip():
        return None
    try:
        return decoded(line)
    except json.JSONDecodeError:
        builder.unread_lines += 1
        return None
    except ValueError as error:
        raise LogError(f"{source.path}, line {number}: {error}") from error


def decoded(text: str) -> Any:
    """Decode JSON. Python's own decoder, slower, also takes NaN and Infinity."""
    try:
        return _decoder.decode(text)
    except msgspec.DecodeError:
        return json.loads(text)


def _spread_lines(text: str, builder: ColumnBuilder) -> Iterator[Chunk]:
    """Yield objects that follow each other, whatever the line breaks between and in them."""
    decoder, place, rows = json.JSONDecoder(), 0, []
    while (place := text.find("{", place)) >= 0:
        try:
            row, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            following = text.find("\n", place)
            builder.unread_lines += following >= 0
            if following < 0:
                break
            place = following
            continue
        rows.append(row)
    yield ObjectRows(rows, 0, "entry")


def _is_document(line: str) -> bool:
    """Return whether a line is a whole log rather than a row of one."""
    try:
        whole = decoded(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(whole, dict) and (
        "log_history" in whole or (bool(whole) and all(isinstance(value, list) for value in whole.values()))
    )


def _transposed(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of an object of columns, as pandas and many scripts write it; one row if it is none."""
    lists = {name: column for name, column in columns.items() if isinstance(column, list)}
    if not lists:
        return [columns]
    length = max(map(len, lists.values()))
    return [{name: column[i] for name, column in lists.items() if i < len(column)} for i in range(length)]
