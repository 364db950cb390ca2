"""What a check has found, and how that is shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """Says how bad a finding is."""

    OK = "ok"
    WARN = "warn"
    """Something works less well than it could, or cannot be checked."""
    FAIL = "fail"
    """Jobs cannot be watched, or nobody would hear of them."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Holds the result of one check."""

    check: str
    level: Level
    text: str
    advice: str = ""
    """What to do; empty if nothing is to be done."""


def ok(check: str, text: str) -> Finding:
    """Return a finding that needs nothing to be done."""
    return Finding(check=check, level=Level.OK, text=text)


def warn(check: str, text: str, advice: str) -> Finding:
    """Return a finding of level WARN."""
    return Finding(check=check, level=Level.WARN, text=text, advice=advice)


def fail(check: str, text: str, advice: str) -> Finding:
    """Return a finding of level FAIL."""
    return Finding(check=check, level=Level.FAIL, text=text, advice=advice)


def lines(findings: Iterable[Finding]) -> list[str]:
    """Return a line for each finding, and one for its advice."""
    result = []
    for each in findings:
        result.append(f"{each.level:<5}{each.check:<15}{each.text}")
        if each.advice:
            result.append(f"{'':<20}{each.advice}")
    return result


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 1 if a check has failed, else 0."""
    return int(any(each.level is Level.FAIL for each in findings))
