"""Triton's interpreter, several times as fast for small kernels."""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any


@cache
def hasten() -> None:
    """Put the interpreter's operations in the place of Triton's once, and leave them there.

    The interpreter does that for each launch and for each call of a device function, which takes longer than what the
    function computes.
    """
    from triton.runtime import interpreter

    replace = vars(interpreter)["_patch_lang"]

    class Unrestored:
        def restore(self) -> None:
            """Leave them."""

    @cache
    def replace_in(module: str, function: FunctionType) -> Unrestored:
        replace(function)
        return Unrestored()

    known: dict[str, FunctionType] = {}

    def replace_once(function: Any) -> Unrestored:
        module = function.__globals__["__name__"]
        return replace_in(module, known.setdefault(module, function))

    vars(interpreter)["_patch_lang"] = replace_once
