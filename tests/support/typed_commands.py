"""What documents tell people to type: blocks of commands, each after the name of its machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Typed(NamedTuple):
    """A command, and the lines that are shown below it."""

    machine: str
    line: str
    shown: list[str]


def typed_commands(document: str) -> list[Typed]:
    """Return the commands of all blocks, in order."""
    return [each for block in re.findall(r"```console\n(.*?)```", document, re.DOTALL) for each in _typed(block)]


def _typed(block: str) -> Iterator[Typed]:
    for part in re.split(r"^(?=\w+\$ )", block, flags=re.MULTILINE)[1:]:
        command, *shown = filter(None, part.splitlines())
        machine, _, line = command.partition("$ ")
        yield Typed(machine, line, shown)
