"""`python -m foreshock._training_facts`: prints what `foreshock doctor` asks about this interpreter, as JSON."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def facts() -> dict[str, Any]:
    """Return the facts, also where torch cannot be imported."""
    found: dict[str, Any] = {"torch": "", "torch_error": "", "cuda_built": False, "fused": []}
    found |= {"devices": [], "devices_error": "", "triton": "", "compiler": has_compiler()}
    found |= {"settings_error": "", "unknown": [], "disabled": False}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    try:
        found |= _of_torch()
    except Exception as error:
        # A broken installation raises anything.
        found["torch_error"] = _line(error)
    else:
        found |= _of_devices() | _of_settings()
    return found


def has_compiler() -> bool:
    """Return whether Triton finds a C compiler: CC as one program, or gcc or clang if it is not set.

    Source: `_build` in triton/runtime/build.py, Triton 3.7.
    """
    names = ("gcc", "clang") if (chosen := os.environ.get("CC")) is None else (chosen,)
    return any(shutil.which(name) for name in names)


def _of_torch() -> dict[str, Any]:
    import inspect

    import torch

    kinds = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
    return {
        "torch": str(torch.__version__),
        "cuda_built": torch.version.cuda is not None,
        "fused": [kind.__name__ for kind in kinds if "fused" in inspect.signature(kind).parameters],
    }


def _of_devices() -> dict[str, Any]:
    import torch

    try:
        return {"devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}
    except Exception as error:
        # A driver that does not match raises anything.
        return {"devices_error": _line(error)}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _of_settings() -> dict[str, Any]:
    from foreshock._attach.settings import kill_switch, settings_from
    from foreshock._attach.variables import unknown_variables
    from foreshock._errors import SettingsError

    found: dict[str, Any] = {"unknown": unknown_variables(os.environ)}
    try:
        settings_from()
        found["disabled"] = kill_switch()
    except SettingsError as error:
        found["settings_error"] = str(error)
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(facts()) + "\n")
