"""Text from the other side of the wire, made fit for one line of a log or a terminal."""

from __future__ import annotations


def escaped(text: str) -> str:
    """Return text with each character that cannot be printed as its escape sequence in Python."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
