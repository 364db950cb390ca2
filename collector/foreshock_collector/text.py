"""Text that comes from outside, made fit for labels, pages, log lines and terminals."""

from __future__ import annotations

import zlib

from foreshock_protos.text import escaped

NAME_LENGTH = 200
"""Names become labels of series, which should be short."""
PATH_LENGTH = 2000
"""Parameters and layers of deeply wrapped models have long paths."""
TEXT_LENGTH = 2000


def printable(text: str, limit: int) -> str:
    """Return text without control characters, spaces of other kinds and joiners, which are escaped; shortened."""
    shown = escaped(text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def identifier(text: str, limit: int = NAME_LENGTH) -> str:
    """Return a name as `printable` does, yet two names that differ stay different: a changed one gets a checksum."""
    shown = escaped(text)
    if shown == text and len(text) <= limit:
        return text
    suffix = f"-{zlib.crc32(text.encode(errors='surrogatepass')):08x}"
    return shown[: limit - len(suffix)] + suffix
