"""Checks of the Python environment that trains: torch, its devices, Triton, fused optimizers and the settings.

They come from a process of its own: importing torch takes seconds, and may fail in any way.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

from foreshock_recorder.doctor.finding import Finding, fail, ok, warn
from foreshock_recorder.doctor.interpreter import last_line, run

FACTS = "foreshock._training_facts"
"""Module that prints the facts, as JSON."""
_TORCH = (2, 13)
"""Oldest version of torch that Foreshock is tested with."""
_SECONDS = 120.0


def training(python: str) -> list[Finding]:
    """Check an interpreter that runs trainings."""
    advice = "run foreshock doctor with the interpreter that trains"
    try:
        done = run([python, "-m", FACTS], _SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [fail("torch", f"{python} does not run: {error}", advice)]
    try:
        facts = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return [fail("torch", f"{python} printed no facts: {last_line(done)}", advice)]
    return findings(facts)


def findings(facts: Mapping[str, Any]) -> list[Finding]:
    """Return what follows from the facts that the module `FACTS` prints."""
    if facts["torch_error"]:
        advice = "run foreshock doctor with the interpreter that trains"
        return [fail("torch", f"cannot be imported: {facts['torch_error']}", advice), *_settings(facts)]
    return [_torch(facts), _devices(facts), _triton(facts), _fused(facts), *_settings(facts)]


def _torch(facts: Mapping[str, Any]) -> Finding:
    text = str(facts["torch"])
    release = tuple(int(part) for part in text.partition("+")[0].split(".")[:2] if part.isdecimal())
    if release < _TORCH:
        return warn("torch", f"{text} is older than what is tested", f"use {'.'.join(map(str, _TORCH))} or newer")
    return ok("torch", text)


def _devices(facts: Mapping[str, Any]) -> Finding:
    devices = facts["devices"]
    advice = "check nvidia-smi and CUDA_VISIBLE_DEVICES"
    if facts["devices_error"]:
        return fail("devices", f"cannot be used: {facts['devices_error']}", advice)
    if devices:
        return ok("devices", f"{len(devices)}: {', '.join(sorted(set(devices)))}")
    if facts["cuda_built"]:
        return warn("devices", "torch is built for CUDA, and finds no device", advice)
    return ok("devices", "none: trains on the CPU")


def _triton(facts: Mapping[str, Any]) -> Finding:
    if not facts["devices"] and not facts["devices_error"]:
        return ok("triton", "not needed on a CPU")
    slower = "without it, each step launches more kernels"
    if not facts["triton"]:
        return warn("triton", "not installed", f"pip install triton; {slower}")
    if not facts["compiler"]:
        advice = "install gcc or clang; CC, if set, must name one program, without arguments"
        return warn("triton", f"{facts['triton']}, but no C compiler", f"{advice}; {slower}")
    return ok("triton", str(facts["triton"]))


def _fused(facts: Mapping[str, Any]) -> Finding:
    fused = facts["fused"]
    if not fused:
        return warn("optimizers", "none can be fused", "update torch: skip=True needs a fused optimizer")
    return ok("optimizers", f"{', '.join(fused)} can be fused")


def _settings(facts: Mapping[str, Any]) -> list[Finding]:
    found = [warn("settings", line, "correct or unset it") for line in facts["unknown"]]
    if facts["settings_error"]:
        found.append(fail("settings", facts["settings_error"], "correct the variable: attach would raise this"))
    elif facts["disabled"]:
        found.append(warn("settings", "FORESHOCK_DISABLED is on: nothing is watched", "unset it"))
    return found or [ok("settings", "the environment's variables are valid")]
