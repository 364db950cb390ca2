"""Reads tables with a header: CSV with commas, semicolons, tabs or spaces, as Lightning, W&B and pandas write them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from foreshock_collector.commands.logs.columns import Chunk, Floats
from foreshock_collector.commands.logs.names import Names, has_meaning
from foreshock_collector.commands.logs.source import Source, lines_of

_DELIMITERS = "\t;,|"
_LONGEST_CELL = 1 << 24
"""Characters. The default of 131,072 is less than a configuration that some loggers put into a cell."""
_VALUE = re.compile(r"^[-+.]?\d|[:=]\s*$|[:=]\s*[-+.]?\d")
"""Cells that no header has: a number, or a name with one."""
csv.field_size_limit(_LONGEST_CELL)


Column = Sequence[str | None] | Floats
"""Cells as text, None where a row is too short, or as numbers."""


class TableRows:
    """Holds consecutive rows of a table."""

    def __init__(self, header: list[str], columns: Sequence[Column], first: int) -> None:
        """first: number of the first row, from 0."""
        self.fields = header
        self._columns, self._first = columns, first
        self._count = len(columns[0]) if columns else 0

    def __len__(self) -> int:
        return self._count

    def column(self, name: str) -> Sequence[Any] | Floats:
        """Return one column as numbers, or as text with None where a row has no such cell."""
        place = self.fields.index(name) if name in self.fields else len(self._columns)
        return self._columns[place] if place < len(self._columns) else [None] * self._count

    def empty(self, row: int, names: Names) -> bool:
        """Return whether a row has nothing but a step, an epoch and a rate."""
        apart = {names.step, names.epoch, names.rate}
        cells = ((field, column[row]) for field, column in zip(self.fields, self._columns, strict=False))
        return not any(cell is not None and str(cell).strip() for field, cell in cells if field not in apart)

    def where(self, row: int) -> str:
        """Return the number of a row."""
        return f"data row {self._first + row}"


def header_of(text: str) -> tuple[list[str], str]:
    """Return the names in the first line that has any, and their delimiter."""
    line = next((line for line in text.splitlines() if line.strip(" \t#")), "").lstrip("#")
    delimiter = max(_DELIMITERS, key=line.count)
    return _cells(line, delimiter if delimiter in line else " "), delimiter if delimiter in line else " "


def is_table(text: str) -> bool:
    """Return whether the text begins with a header that names a loss or a norm."""
    cells, _ = header_of(text)
    return any(map(has_meaning, cells)) and not any(_VALUE.search(cell) for cell in cells)


def read_table(source: Source) -> Iterator[Chunk]:
    """Yield the rows of a table. A header that comes again, as after a resume, begins a table of its own."""
    header, delimiter = header_of(source.text)
    known, number, begun = set(header), 0, False
    for block in source.blocks():
        columns = _columns_without_csv(block, delimiter, len(header), known) if begun else None
        if columns is not None:
            yield (chunk := TableRows(header, columns, number))
            number += len(chunk)
            continue
        lines = csv.reader(lines_of(block), delimiter=delimiter, skipinitialspace=delimiter == " ")
        rows = [cells for cells in lines if cells]
        if rows and not source.complete and len(rows[-1]) < len(header):
            rows.pop()
        for part in _split_at_headers(rows, known):
            if part and part[0][0].strip(" #") in known:
                header, begun = [cell.strip(" #") for cell in part[0]], True
                known.update(header)
                del part[0]
            if begun:
                yield (chunk := TableRows(header, _columns(part, len(header)), number))
                number += len(chunk)


def _columns_without_csv(text: str, delimiter: str, count: int, known: set[str]) -> Sequence[Column] | None:
    """Return the columns of a block much faster than `csv` can; None if the text needs it."""
    if delimiter == " " or '"' in text or not text.endswith("\n") or text.isspace():
        return None
    try:
        numbers = np.loadtxt(io.StringIO(text), delimiter=delimiter, comments=None, ndmin=2)
    except ValueError:
        # Some cells are empty, or text.
        columns = _split_columns(text, delimiter, count)
        return columns if columns is not None and known.isdisjoint(columns[0]) else None
    return list(numbers.T) if numbers.shape[1] == count else None


def _split_columns(text: str, delimiter: str, count: int) -> list[list[str]] | None:
    """Return the cells by column; None if not all lines have the same number of cells."""
    # A cell that ends a line keeps its line break, which numbers allow.
    cells = text.replace("\n", f"\n{delimiter}").split(delimiter)
    del cells[-1]
    columns = [cells[place::count] for place in range(count)]
    rows = len(columns[-1])
    aligned = len(cells) == rows * count and text.count("\n") == "".join(columns[-1]).count("\n") == rows
    return columns if aligned else None


def _columns(rows: list[list[str]], count: int) -> Sequence[Sequence[str | None]]:
    try:
        return list(zip(*rows, strict=True))
    except ValueError:
        return list(zip(*([*row[:count], *[None] * (count - len(row))] for row in rows), strict=True))


def _split_at_headers(rows: list[list[str]], known: set[str]) -> list[list[list[str]]]:
    """Return the rows in parts, each of which begins with a header but for the first."""
    # The name of a column in the first cell: numbers are never names.
    starts = [place for place, cells in enumerate(rows) if cells[0].strip(" #") in known]
    return [rows[first:last] for first, last in zip([0, *starts], [*starts, len(rows)], strict=True)]


def _cells(line: str, delimiter: str) -> list[str]:
    cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=delimiter == " "), [])
    return [cell.strip() for cell in cells if cell.strip()] if delimiter == " " else [cell.strip() for cell in cells]
