"""Reads what training scripts print: pairs of a name and a number, wherever they stand in a line.

nanoGPT, llm.c, Megatron-LM, torchtitan, fairseq, OLMo, MMEngine, detectron2, MAE and Hugging Face's Trainer differ in
punctuation only, so that names are found by meaning here too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from foreshock_collector.commands.logs.columns import Chunk, ColumnBuilder
from foreshock_collector.commands.logs.names import Names
from foreshock_collector.commands.logs.source import Source, lines_of

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|(?i:nan|inf(?:inity)?)\b)"
_WORD = r"[A-Za-z_][\w./()-]*"
_PAIR = re.compile(
    rf"(?<!\w)((?!(?:DEBUG|INFO|WARNING) ){_WORD}(?: (?:{_WORD}|\(\w+ \d+\))){{0,3}}?)"
    rf"(?:['\"]?\s*[:=]\s*['\"]?|\s+)({_NUMBER})(?![\w.])"
)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_EVALUATION = re.compile(
    r"(?<![\w/.-])(?:val|valid|validation|validating|eval|evaluation|evaluating|test|dev)(?![\w/.-])|\| train \|",
    re.IGNORECASE,
)
"""Lines of an evaluation, or fairseq's summary of an epoch. A word in a path is none."""
_EVALUATION_PARTS = ("val", "test", "dev", "| train |")
"""Words of which each match of `_EVALUATION` contains one, in lower case."""
_EPOCH = re.compile(r"\bepoch(?:\(train\))?:?\s*\[?(\d+)\]?:?\s*\[?\s*(\d+)\s*/\s*(\d+)", re.IGNORECASE)
"""Epoch, iteration in it and iterations of an epoch: "Epoch(train) [2][ 50/7330]", "epoch 002:  50 / 7330"."""
_ITERATION = re.compile(r"\bIter(?:\(train\))?\s*\[\s*(\d+)\s*/\s*\d+\]")
_LONGEST_LINE = 65_536
"""Characters; a longer line is no row but a dump of something."""
_INDENTED = re.compile(r"^\s+\S.*=")
_COUNTED = "counted step"
"""Name of a step that is counted from an epoch and an iteration in it."""
_OPENING = "[step="
"""Begins a row whose values follow on indented lines."""


class TextRows:
    """Holds rows that were read from lines of text, each with the pairs that the line has."""

    def __init__(self, rows: list[dict[str, str]], numbers: list[int]) -> None:
        self._rows, self._numbers = rows, numbers
        self.fields: Iterable[str] = list(dict.fromkeys(name for row in rows for name in row))

    def column(self, name: str) -> Sequence[Any]:
        """Return one value of each row as text; None where it has none."""
        return [row.get(name) for row in self._rows]

    def empty(self, row: int, names: Names) -> bool:  # noqa: ARG002
        """Return False: a line without a loss and a norm is no row."""
        return False

    def where(self, row: int) -> str:
        """Return the number of a line."""
        return f"line {self._numbers[row]}"


def read_text(source: Source, builder: ColumnBuilder) -> Iterator[Chunk]:
    """Yield the rows of a log of text."""
    lines = _Lines(builder.names)
    for block in source.blocks():
        for line in lines_of(block):
            lines.add(line)
        yield lines.rows(kept=0 if source.live else 2)
    lines.end(torn=not source.complete)
    yield lines.rows()


class _Lines:
    """Makes rows of lines."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._number = 0
        self._first_epoch: int | None = None
        self._rows: list[dict[str, str]] = []
        self._numbers: list[int] = []
        self._open: dict[str, str] | None = None
        """Row to which indented lines may follow, as OLMo writes them."""
        self._seen: set[tuple[str, ...]] = set()

    def add(self, line: str) -> None:
        """Add the next line."""
        self._number += 1
        if len(line) > _LONGEST_LINE or not (pairs := self._pairs(line)):
            return
        if self._open is not None:
            if _INDENTED.match(line):
                self._open.update({name: value for name, value in pairs.items() if name not in self._open})
                return
            self._close()
        # Regular expressions that ignore case are slow: most lines have none of these words at all.
        lower = line.lower()
        if any(word in lower for word in _EVALUATION_PARTS) and _EVALUATION.search(line):
            return
        if "epoch" in lower and (epoch := _EPOCH.search(line)):
            index, iteration, length = map(int, epoch.groups())
            self._first_epoch = index if self._first_epoch is None else self._first_epoch
            pairs[_COUNTED] = str((index - min(1, self._first_epoch)) * length + iteration)
        elif "Iter" in line and (found := _ITERATION.search(line)):
            pairs[_COUNTED] = found[1]
        if _OPENING in line:
            self._open = pairs
        else:
            self._append(pairs)

    def rows(self, kept: int = 0) -> TextRows:
        """Return the rows so far, and drop them. kept: how many of the newest stay, because their end is not known."""
        last = max(0, len(self._rows) - kept)
        found = TextRows(self._rows[:last], self._numbers[:last])
        del self._rows[:last], self._numbers[:last]
        return found

    def end(self, *, torn: bool) -> None:
        """End the log. torn: its last line has no line break, and is dropped if it has less than the one before."""
        is_open = self._open is not None
        self._close()
        if torn and not is_open and len(self._rows) > 1 and len(self._rows[-1]) < len(self._rows[-2]):
            del self._rows[-1], self._numbers[-1]

    def _close(self) -> None:
        if self._open is not None:
            self._append(self._open)
        self._open = None

    def _append(self, pairs: dict[str, str]) -> None:
        # Lines without a loss and a norm, such as settings at the start, choose no names.
        if not self._names.has_values(pairs):
            self._names.note(pairs)
            return
        fields = tuple(pairs)
        if fields not in self._seen:
            self._seen.add(fields)
            self._names.add(fields)
        self._rows.append(pairs)
        self._numbers.append(self._number)

    @staticmethod
    def _pairs(line: str) -> dict[str, str]:
        text = _ANSI.sub("", line) if "\x1b" in line else line
        return dict(_PAIR.findall(text))
