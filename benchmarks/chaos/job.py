"""A job under load, and the faults that happen to it."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.chaos.collector import CLOCK
from benchmarks.chaos.proxy import Proxy
from benchmarks.chaos.ranks import UNREAD_SUFFIX
from benchmarks.chaos.relay import Relay
from foreshock_recorder.layout import FACTS, JSON_OFFSET
from foreshock_recorder.reader import RingReader
from tests.support.collector_process import Collector
from tests.support.launched_jobs import recorders
from tests.support.waiting import eventually

RUN = "chaos"
_HEADER_BYTES = 100
"""By which SQLite knows a database, and a collector its own."""
_PAGE_BYTES = 4096
"""Of SQLite's pages."""
_HOLD_SECONDS = 1.0
"""How long a process is stopped, a connection delayed, a database held or a disk full."""
_DAY_SECONDS = 86400.0
_DISK_BYTES = 512 * 2**20
"""Of each disk that can be filled, in memory: a thousand faults write a database of some 100 MB."""
_FILL_BYTES = 2**20


@dataclass
class Job:
    """Ranks that write steps, their recorder, a proxy, a relay, and a collector: what faults happen to."""

    folder: Path
    pace: float
    """Seconds between steps."""
    collector: Collector = field(init=False)
    relay: Relay = field(init=False)
    proxy: Proxy = field(init=False)
    ranks: subprocess.Popen[bytes] = field(init=False)
    """Process of all ranks of the newest launch."""
    launches: list[str] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    regressions: int = 0
    overwritten: int = 0
    """Records that were overwritten in a ring before a collector had them, at most."""

    def __post_init__(self) -> None:
        self.rings.mkdir(exist_ok=True)
        self.storage.mkdir(exist_ok=True)
        self._clock.write_text("0")
        self.collector = Collector(self.storage, module="benchmarks.chaos.collector", **{CLOCK: str(self._clock)})
        self.relay = Relay(self.collector.address)
        self.proxy = Proxy(self.relay.port)

    @property
    def rings(self) -> Path:
        return self.folder / "rings"

    @property
    def storage(self) -> Path:
        """Folder of the collector's database."""
        return self.folder / "collector"

    @property
    def database(self) -> Path:
        return self.storage / "foreshock.db"

    @property
    def _clock(self) -> Path:
        """File of the seconds by which the collector's clock is ahead."""
        return self.folder / "clock"

    def set_clock(self, seconds: float) -> None:
        """Set the collector's clock so far ahead, or behind if it is negative."""
        draft = self._clock.with_suffix(".draft")
        draft.write_text(str(seconds))
        draft.rename(self._clock)

    @property
    def stop(self) -> Path:
        """File that ends the ranks."""
        return self.folder / "stop"

    def launch(self) -> None:
        """Start ranks, as another launch of the run."""
        self.launches.append(f"launch-{len(self.launches)}")
        self.ranks = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.chaos.ranks", str(self.rings / RUN / self.launches[-1]),
             f"127.0.0.1:{self.proxy.port}", "--pace", str(self.pace), "--stop", str(self.stop),
             "--durations", str(self._durations_file(self.launches[-1]))],
        )  # fmt: skip

    def _durations_file(self, launch: str) -> Path:
        return self.folder / f"{launch}.durations"

    def durations(self, launch: str) -> list[tuple[float, float]]:
        """Return the seconds of each finished step of a launch, and of the same step in rings that nobody reads."""
        path = self._durations_file(launch)
        content = path.read_bytes() if path.exists() else b""
        pair = struct.Struct("2d")
        return list(pair.iter_unpack(content[: len(content) // pair.size * pair.size]))

    def undelivered(self) -> list[Path]:
        """Return the rings of launches before the newest."""
        return [path for path in self.rings.rglob("*.ring") if path.parent.name != self.launches[-1]]

    def ring(self) -> Path:
        """Return the ring of a rank of the newest launch."""
        return random.choice(sorted((self.rings / RUN / self.launches[-1]).glob("*.ring")))

    def set_aside(self) -> int:
        """Return how many damaged databases the collector has set aside."""
        return len(list(self.storage.glob("*.damaged-[0-9]")))

    def recorder_pids(self) -> list[int]:
        return [int(pid) for pid in recorders(self.rings)]

    def look(self) -> float:
        """Scrape the collector: count what went back. Return the steps that it has counted."""
        with suppress(OSError):
            for family in text_string_to_metric_families(self.collector.metrics()):
                for sample in family.samples:
                    # A launch whose predecessor is not known to be dead becomes a run of another name.
                    if family.type == "counter" and sample.labels.get("run", "").startswith(RUN):
                        key = sample.name + json.dumps(sample.labels)
                        self.regressions += sample.value < self.counters.get(key, 0.0)
                        self.counters[key] = sample.value
        return sum(value for key, value in self.counters.items() if key.startswith("foreshock_steps_total"))


def _hold(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(_HOLD_SECONDS)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def kill_collector(job: Job) -> None:
    job.collector.kill_and_restart()


def stop_collector(job: Job) -> None:
    _hold([job.collector.process.pid])


def drain_collector(job: Job) -> None:
    job.collector.stop()
    job.collector.start()


def kill_recorder(job: Job) -> None:
    for pid in job.recorder_pids():
        os.kill(pid, signal.SIGKILL)


def stop_recorder(job: Job) -> None:
    _hold(job.recorder_pids())


def drain_recorder(job: Job) -> None:
    for pid in job.recorder_pids():
        os.kill(pid, signal.SIGTERM)


def stop_ranks(job: Job) -> None:
    _hold([job.ranks.pid])


def kill_ranks(job: Job) -> None:
    job.ranks.kill()
    job.ranks.wait()
    for path in job.rings.rglob(f"*{UNREAD_SUFFIX}"):
        path.unlink()
    job.launch()


def cut_connections(job: Job) -> None:
    job.proxy.cut()


def delay_data(job: Job) -> None:
    job.proxy.delay(0.3)
    time.sleep(_HOLD_SECONDS)
    job.proxy.delay(0.0)


def swallow_data(job: Job) -> None:
    job.proxy.swallow(True)
    time.sleep(_HOLD_SECONDS)
    job.proxy.cut()
    job.proxy.swallow(False)


def swallow_answers(job: Job) -> None:
    """Let the collector store what it is sent, and nobody hear of it: all of that comes again."""
    job.proxy.swallow_answers(True)
    time.sleep(_HOLD_SECONDS)
    job.proxy.cut()
    job.proxy.swallow_answers(False)


def scramble_batches(job: Job) -> None:
    job.relay.scramble(True)
    time.sleep(_HOLD_SECONDS)
    job.relay.scramble(False)


def set_clock_forward(job: Job) -> None:
    _set_clock(job, _DAY_SECONDS)


def set_clock_back(job: Job) -> None:
    _set_clock(job, -_DAY_SECONDS)


def _set_clock(job: Job, seconds: float) -> None:
    # Set right again: retention goes by age, and deletes what is weeks old.
    job.set_clock(seconds)
    time.sleep(_HOLD_SECONDS)
    job.set_clock(0.0)


def add_damaged_ring(job: Job) -> None:
    """Put a ring of random bytes behind a valid header beside the ranks' own, for a while."""
    folder = job.rings / RUN / job.launches[-1]
    (source, *_) = folder.glob("*.ring")
    damaged = folder / "rank-damaged.ring"
    content = bytearray(source.read_bytes())
    content[JSON_OFFSET:] = random.randbytes(len(content) - JSON_OFFSET)
    damaged.write_bytes(content)
    time.sleep(_HOLD_SECONDS)
    damaged.unlink(missing_ok=True)


def overwrite_header(job: Job) -> None:
    """Put random bytes in the place of a ring's header, long enough for a recorder to read them.

    Its rank restores it with the next step.
    """
    path = job.ring()
    before = path.read_bytes()[: FACTS.size]
    os.kill(job.ranks.pid, signal.SIGSTOP)
    _overwrite(path, 0, JSON_OFFSET)
    time.sleep(_HOLD_SECONDS)
    os.kill(job.ranks.pid, signal.SIGCONT)
    eventually(lambda: path.read_bytes()[: FACTS.size] == before, "a header that is whole again")


def overwrite_slots(job: Job) -> None:
    """Put random bytes in the place of all records of a ring. What no collector has by then is counted as dropped."""
    path = job.ring()
    reader = RingReader(path)
    acknowledged, offset = reader.acknowledged, reader.layout.header_bytes
    _overwrite(path, offset, reader.layout.file_bytes - offset)
    # The rank may have begun another meanwhile.
    job.overwritten += reader.begun + 1 - acknowledged
    reader.close()


def _overwrite(path: Path, offset: int, size: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        file.write(random.randbytes(size))


def overwrite_database(job: Job) -> None:
    """Put random bytes in the place of all tables."""
    _destroy(job, lambda path: _overwrite(path, _HEADER_BYTES, path.stat().st_size - _HEADER_BYTES))


def cut_database(job: Job) -> None:
    """Leave a database its first page."""
    _destroy(job, lambda path: os.truncate(path, _PAGE_BYTES))


def _destroy(job: Job, harm: Callable[[Path], None]) -> None:
    aside = job.set_aside()
    with closing(sqlite3.connect(job.database)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    harm(job.database)
    time.sleep(_HOLD_SECONDS)
    if job.set_aside() == aside:
        # Its newest pages are in its memory: it has not read a damaged one yet.
        job.collector.kill_and_restart()
    eventually(lambda: job.set_aside() > aside, "a damaged database that is set aside")
    # The new one counts from the beginning what rings hold.
    job.counters.clear()


def hold_database(job: Job) -> None:
    with closing(sqlite3.connect(job.database, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        time.sleep(_HOLD_SECONDS)


def _fill(folder: Path) -> None:
    """Leave no room on the disk of a folder for a while."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(_FILL_BYTES))
    time.sleep(_HOLD_SECONDS)
    filler.unlink()


def fill_storage(job: Job) -> None:
    with closing(sqlite3.connect(job.database)) as database:
        # Its log has room for many more commits otherwise.
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    _fill(job.storage)


def fill_rings(job: Job) -> None:
    _fill(job.rings)


FAULTS: dict[str, Callable[[Job], None]] = {
    "collector killed": kill_collector,
    "collector stopped for a second": stop_collector,
    "collector asked to end": drain_collector,
    "recorder killed": kill_recorder,
    "recorder stopped for a second": stop_recorder,
    "recorder asked to end": drain_recorder,
    "ranks stopped for a second": stop_ranks,
    "ranks killed, job started again": kill_ranks,
    "connections cut": cut_connections,
    "data delayed": delay_data,
    "data swallowed, then cut": swallow_data,
    "answers swallowed, then cut": swallow_answers,
    "batches repeated and exchanged": scramble_batches,
    "clock a day ahead, then right": set_clock_forward,
    "clock a day behind, then right": set_clock_back,
    "damaged ring beside the others": add_damaged_ring,
    "header of a ring overwritten": overwrite_header,
    "slots of a ring overwritten": overwrite_slots,
    "database held by another process": hold_database,
}
DATABASE_FAULTS: dict[str, Callable[[Job], None]] = {
    "database overwritten": overwrite_database,
    "database cut short": cut_database,
}
"""Destroy what was acknowledged. Nothing is lost only as long as rings still hold all steps."""
DISK_FAULTS: dict[str, Callable[[Job], None]] = {
    "disk of the database full": fill_storage,
    "disk of the rings full": fill_rings,
}
"""Need disks of their own."""


def mount_disks(folder: Path) -> None:
    """Give the job in a folder small disks, in the mount namespace of this process: they end with it."""
    for name in ("rings", "collector"):
        (folder / name).mkdir()
        options = f"size={_DISK_BYTES},mode=0700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder / name)], check=True)


def unmount_disks(folder: Path) -> None:
    for name in ("rings", "collector"):
        subprocess.run(["umount", str(folder / name)], check=True)
