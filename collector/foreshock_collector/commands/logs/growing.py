"""Reads a log that is being written: a file that grows, is truncated or replaced, or a pipe."""

from __future__ import annotations

import codecs
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from foreshock_collector.commands.logs.columns import LogError
from foreshock_collector.commands.logs.source import STANDARD_INPUT, Source, encoding_of

_BLOCK_BYTES = 1 << 20
Ending = Literal["", "ended", "replaced", "truncated"]


class GrowingSource(Source):
    """Gives the lines of a log as they are written; see `opened_growing`."""

    live = True

    def __init__(self, path: Path, file: BinaryIO, idle: Callable[[], None]) -> None:
        """idle: called while there is nothing to read; it waits a little."""
        self.path = path
        self.ending: Ending = ""
        """Why there are no more lines: a pipe was closed, or the file is another one now; empty before."""
        self.complete = True
        self._file, self._idle = file, idle
        self._descriptor = file.fileno()
        self._rest, self._position = "", 0
        self.head = self._read()
        self.encoding = encoding_of(self.head)
        self._decode = codecs.getincrementaldecoder(self.encoding)("replace").decode
        self._first = self._lines(self.head)
        while not self._first and not self.ending:
            self._first = self._lines(self._read())
        self.text = self._first

    def blocks(self) -> Iterator[str]:
        """Yield complete lines as they come, until the log ends."""
        if self._first:
            yield self._first
        while data := self._read():
            if lines := self._lines(data):
                yield lines
        if self._rest:
            self.complete = False
            yield self._rest

    def whole(self) -> str:
        """Raise `LogError`: what is written as a whole is never complete."""
        raise LogError(f"{self.path}: a log that is rewritten as a whole cannot be followed; only one of lines can")

    def _lines(self, data: bytes) -> str:
        text = (self._rest + self._decode(data)).replace("\r\n", "\n").replace("\r", "\n")
        end = text.rfind("\n") + 1
        self._rest = text[end:]
        return text[:end]

    def _read(self) -> bytes:
        """Return what is new, waiting for it; nothing once the log has ended."""
        while not self.ending:
            if select.select([self._descriptor], [], [], 0)[0]:
                if data := os.read(self._descriptor, _BLOCK_BYTES):
                    self._position += len(data)
                    return data
                self.ending = self._why_empty()
            if not self.ending:
                self._idle()
        return b""

    def _why_empty(self) -> Ending:
        opened = os.fstat(self._descriptor)
        if not self.path.is_file():
            # A file that has gone is one that is being rotated.
            return "" if stat.S_ISREG(opened.st_mode) else "ended"
        named = self.path.stat()
        if (named.st_dev, named.st_ino) != (opened.st_dev, opened.st_ino):
            return "replaced"
        return "truncated" if opened.st_size < self._position else ""


@contextmanager
def opened_growing(path: Path, idle: Callable[[], None]) -> Iterator[GrowingSource]:
    """Open a file, a FIFO, or standard input for "-", and wait for its first line. Raises `OSError`."""
    if str(path) == STANDARD_INPUT:
        yield GrowingSource(path, sys.stdin.buffer, idle)
        return
    with path.open("rb", buffering=0) as file:
        yield GrowingSource(path, file, idle)
