"""Opens a log and decodes its bytes to lines: files, pipes, gzip, UTF-8 and UTF-16."""

from __future__ import annotations

import codecs
import gzip
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_HEAD_BYTES = 65_536
"""Bytes from which a format is recognized."""
_BLOCK_CHARACTERS = 1 << 20
_GZIP = b"\x1f\x8b"
STANDARD_INPUT = "-"


class _Rejoined(io.RawIOBase):
    """Reads the head again, and then the rest of a stream that cannot seek."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


class Source:
    """Gives the bytes and lines of one log. They can be read once, since a pipe has them once."""

    live = False
    """Whether the log is still being written, so that each row counts as soon as it is there."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.head = file.read(_HEAD_BYTES)
        """First bytes, uncompressed."""
        self._file: BinaryIO = io.BufferedReader(_Rejoined(self.head, file))
        if self.head.startswith(_GZIP):
            unpacked = gzip.GzipFile(fileobj=self._file)
            self.head = unpacked.read(_HEAD_BYTES)
            self._file = io.BufferedReader(_Rejoined(self.head, unpacked))  # type: ignore[arg-type]
        self.encoding = encoding_of(self.head)
        self.text = self.head.decode(self.encoding, "ignore")
        """First characters."""
        self.complete = True
        """Whether the last line that was read ended with a line break."""

    def blocks(self) -> Iterator[str]:
        """Yield whole lines, about a million characters at a time, each ended by a line feed."""
        file = io.TextIOWrapper(self._file, self.encoding, "replace")
        while block := file.read(_BLOCK_CHARACTERS) + file.readline():
            self.complete = block.endswith("\n")
            yield block

    def whole(self) -> str:
        """Return all of the text."""
        return "".join(self.blocks())


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """Open a file, a FIFO, or standard input for "-". Raises `OSError`."""
    if str(path) == STANDARD_INPUT:
        yield Source(path, sys.stdin.buffer)
        return
    with path.open("rb") as file:
        yield Source(path, file)


def encoding_of(head: bytes) -> str:
    """Return the encoding of a text: its byte order mark says which, or zeros in every other byte."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = head[:512:2], head[1:512:2]
    if len(odd) > 8 and odd.count(0) > 0.9 * len(odd):
        return "utf-16-le"
    if len(odd) > 8 and even.count(0) > 0.9 * len(even):
        return "utf-16-be"
    return "utf-8-sig"


def lines_of(block: str) -> list[str]:
    """Return the lines of a block without their line breaks."""
    lines = block.split("\n")
    if not lines[-1]:
        del lines[-1]
    return lines
