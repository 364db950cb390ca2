"""Checks of a collector's machine: versions, settings, the proxy, the database and its disk."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from foreshock_collector.config import Config, misspelled_variables
from foreshock_collector.state.database_file import APPLICATION
from foreshock_recorder.doctor.finding import Finding, fail, ok, warn

_PACKAGES = ("foreshock", "grpcio", "protobuf", "aiohttp", "msgspec", "numpy", "prometheus-client")
_LEAST_FREE_BYTES = 100e6
"""Below that, the next commits may fail."""
_GIGABYTE = 1e9


def versions() -> Finding:
    """Return the versions of what a collector runs with."""
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            return fail("versions", f"{name} is not installed here", "in a checkout, pip install '.[collector]'")
    return ok("versions", ", ".join(found))


def settings(environment: Mapping[str, str]) -> list[Finding]:
    """Check the names of the environment's variables. Values are checked where the settings are read."""
    lines = misspelled_variables(environment)
    return [warn("settings", line, "correct or unset it") for line in lines] or [ok("settings", "valid")]


def proxy(config: Config, environment: Mapping[str, str]) -> Finding:
    """Check what a proxy in the environment means for what the collector sends."""
    present = next((name for name in sorted(environment) if name.lower() in ("http_proxy", "https_proxy")), "")
    if not present or not environment[present]:
        return ok("proxy", "none")
    host = urllib.parse.urlsplit(config.otlp_endpoint).hostname or ""
    if host and not urllib.request.proxy_bypass(host):
        return warn(
            "proxy", f"series over OTLP go through {present}", f"add {host} to no_proxy, unless this is intended"
        )
    if config.notify_url:
        return warn("proxy", f"notifications ignore {present}", "run foreshock notify --test: it says if they arrive")
    return ok("proxy", f"{present} is ignored")


def database(path: Path, *, answers: bool) -> Finding:
    """Check the rights of a database, its content and who holds it. answers: a collector answers at its address."""
    folder, advice = path.absolute().parent, "run doctor as the collector's user, or correct the rights"
    if not folder.is_dir():
        return fail("database", f"there is no folder {folder}", "make it, or set --database")
    if not os.access(folder, os.W_OK | os.X_OK):
        return fail("database", f"{folder} is not writable", advice)
    other = "run doctor in the collector's folder, with its environment and --config"
    if not path.exists():
        if answers:
            return warn("database", f"{path} does not exist: the collector has another one", other)
        return ok("database", f"{path} will be made")
    if not (path.is_file() and os.access(path, os.R_OK | os.W_OK)):
        return fail("database", f"{path} is not a file that can be written", advice)
    try:
        if path.stat().st_size and application_of(path) != APPLICATION:
            return fail("database", f"{path} is not a collector's database", "give another path to --database")
    except sqlite3.Error as error:
        return fail("database", f"{path} cannot be read: {error}", "see docs/deploy.md, A damaged database")
    held = is_held(path)
    if answers and not held:
        return warn("database", f"{path} is not in use: the collector has another one", other)
    if held and not answers:
        text = f"{path} is in use, and its collector does not answer"
        return fail("database", text, "stop that one, or run doctor with its environment and --config")
    return ok("database", f"{path}, {size_of(path) / 1e6:,.1f} MB{', in use by the collector' if held else ''}")


def application_of(path: Path) -> int:
    """Return whose database a file is. Raises `sqlite3.Error`. Keeps no writer waiting."""
    # By SQLite: the header of a new database is not in this file yet.
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        (found,) = connection.execute("PRAGMA application_id").fetchone()
    return int(found)


def is_held(path: Path) -> bool:
    """Return whether a collector holds a database."""
    with path.open("rb") as file:
        try:
            # Shared, and for a moment: only a collector that starts right now would be refused.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def size_of(path: Path) -> int:
    """Return the bytes of a database, with those not yet merged into it."""
    files = (path, path.with_name(f"{path.name}-wal"))
    return sum(each.stat().st_size for each in files if each.exists())


def disk(path: Path, most_gigabytes: float) -> Finding:
    """Check that a database has room to grow. most_gigabytes: its largest size, by the settings."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return fail("disk", f"there is no folder {folder}", "make it, or set --database")
    return room(shutil.disk_usage(folder).free, most_gigabytes * _GIGABYTE - size_of(path))


def room(free: float, growth: float) -> Finding:
    """Return the finding for that many free bytes. growth: those that the database may still grow by."""
    text = f"{free / _GIGABYTE:,.1f} GB free"
    if free < _LEAST_FREE_BYTES:
        return fail("disk", text, "free some: nothing is acknowledged while nothing can be stored")
    if free < growth:
        advice = "free some, or lower --database-gigabytes"
        return warn("disk", f"{text}, and the database may grow by {growth / _GIGABYTE:,.1f} GB", advice)
    return ok("disk", text)
