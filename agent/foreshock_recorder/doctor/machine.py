"""Checks of this machine: shared memory, rings, the recorder, the proxy and versions."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from foreshock_recorder.doctor.finding import Finding, fail, ok, warn
from foreshock_recorder.doctor.interpreter import last_line, run
from foreshock_recorder.folder import Contents, contents, paths_below
from foreshock_recorder.layout import MAX_RING_BYTES
from foreshock_recorder.paths import SHARED_MEMORY, ring_base, temporary_base

_RANKS = 8
"""Ranks of a machine that there should be room for: the accelerators of one server."""
_RECORDER_SECONDS = 60.0
_MEBIBYTE = 2**20
_PROXIES = ("https_proxy", "http_proxy", "all_proxy", "grpc_proxy")
_PACKAGES = ("foreshock", "grpcio", "protobuf")
_RECORDER_PACKAGES = ("grpcio", "protobuf")
"""Packages that only the recorder imports."""


def folder_of_rings(base: Path) -> Finding:
    """Check that ranks can make their rings below a folder."""
    existing = _existing(base)
    if not existing.is_dir():
        return fail("rings", f"{existing} is not a folder", "set FORESHOCK_RING_DIR to a folder of this user")
    if existing == base and base.stat().st_uid not in (os.getuid(), 0):
        return fail("rings", f"{base} belongs to another user", "set FORESHOCK_RING_DIR to a folder of this user")
    if not os.access(existing, os.W_OK | os.X_OK):
        return fail("rings", f"{existing} is not writable", "set FORESHOCK_RING_DIR to a folder of this user")
    return ok("rings", f"are made in {base}")


def shared_memory(base: Path) -> Finding:
    """Check that rings have room where they are made."""
    return room(shutil.disk_usage(_existing(base)).free, base, in_memory=SHARED_MEMORY in (base, *base.parents))


def _existing(base: Path) -> Path:
    # Below a folder that this user may not search, Path.exists raises in Python 3.11.
    return next(each for each in (base, *base.parents) if os.path.exists(each))  # noqa: PTH110


def room(free: int, base: Path, *, in_memory: bool) -> Finding:
    """Return the finding for that many free bytes below a folder. in_memory: it is in shared memory."""
    text = f"{free // _MEBIBYTE:,} MiB free; a rank needs up to {MAX_RING_BYTES // _MEBIBYTE} MiB"
    if free < _RANKS * MAX_RING_BYTES and in_memory:
        advice = "enlarge it, with --shm-size in a container; rings without room are made in the temporary folder"
        return warn("shared memory", text, advice)
    if free < _RANKS * MAX_RING_BYTES:
        return warn("shared memory", f"not used; {text}", f"free some below {base}")
    if not in_memory:
        advice = "mount /dev/shm writable, or unset FORESHOCK_RING_DIR, unless this is intended"
        return warn("shared memory", f"not used; {text}", advice)
    return ok("shared memory", text)


def rings_left(launches: Iterable[Contents]) -> Finding:
    """Check for undelivered records of earlier jobs."""
    left = [each for each in launches if not each.alive and each.unacknowledged]
    if not left:
        return ok("left behind", "no records of earlier jobs")
    records = sum(each.unacknowledged for each in left)
    runs = ", ".join(sorted({each.run for each in left}))
    text = f"{records:,} records of earlier jobs have reached no collector: {runs}"
    return warn("left behind", text, "run: foreshock recorder")


def launches() -> list[Contents]:
    """Return what is in the folders of rings of this user."""
    base = ring_base()
    bases = (base, temporary_base()) if SHARED_MEMORY in base.parents else (base,)
    folders = {path.parent for each in bases for path in paths_below(each, "*/*/*.ring")}
    return [found for folder in sorted(folders) if (found := contents(folder)) is not None]


def recorder(python: str) -> Finding:
    """Check that an interpreter can run the recorder."""
    code = "import foreshock_recorder.recorder"
    command = [python, "-c", code]
    advice = "install foreshock there, or set FORESHOCK_RECORDER_PYTHON to an interpreter that has it"
    try:
        done = run(command, _RECORDER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return fail("recorder", f"{python} does not run: {error}", advice)
    if done.returncode:
        return fail("recorder", f"{shlex.join(command)} fails: {last_line(done)}", advice)
    return ok("recorder", f"runs with {python}")


def proxy(environment: Mapping[str, str]) -> Finding:
    """Check whether a proxy is in the way."""
    present = [name for each in _PROXIES for name in (each, each.upper()) if environment.get(name)]
    used = environment.get("FORESHOCK_HTTP_PROXY") == "1"
    if used and not present:
        return warn("proxy", "FORESHOCK_HTTP_PROXY=1, and no proxy is set", f"set {_PROXIES[0]}, or unset it")
    if used:
        return ok("proxy", f"used, from {present[0]}")
    return ok("proxy", f"{present[0]} is ignored; FORESHOCK_HTTP_PROXY=1 would use it" if present else "none")


def versions(environment: Mapping[str, str]) -> Finding:
    """Return the versions of what runs beside a training. A recorder in another environment has its own packages."""
    found = []
    elsewhere = _RECORDER_PACKAGES if environment.get("FORESHOCK_RECORDER_PYTHON") else ()
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            if name in elsewhere:
                continue
            return fail("versions", f"{name} is not installed here", f"pip install {name}")
    return ok("versions", ", ".join(found))
