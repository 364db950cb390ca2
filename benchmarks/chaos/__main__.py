"""Break things at random moments under load, and count what was lost: `make chaos ARGS="--faults 100 --seed 7"`.

Ends with 1 if a step was lost that was not counted, stored twice, or counted twice; if a counter went back; if a
process or a ring was left; or if faults made a step slower than the same step written at the same moment into rings
that nobody reads. Disks are filled where `unshare` can make a mount namespace for them.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.chaos.fleet import come_back
from benchmarks.chaos.job import DATABASE_FAULTS, DISK_FAULTS, FAULTS, RUN, Job, mount_disks, unmount_disks
from benchmarks.chaos.ledger import Mark, partial_steps, processes, quantiles, stored_steps, table
from tests.support.waiting import eventually

_QUIET_STEPS = 2000
"""Steps before the first fault."""
_MOST_SLOWDOWN = 1.5
"""Of the median, the 99 % and the 99.9 % of a step beside those of the step that nobody reads."""
_DESTROYED = 4
"""Databases that are destroyed, one after the other: so few that the rings of a job still hold all of its steps."""
_NAMESPACE = "FORESHOCK_CHAOS_NAMESPACE"
"""Set in the mount namespace of this benchmark."""


def run(
    folder: Path,
    names: Sequence[str],
    *,
    faults: int,
    seed: int,
    pace: float,
    quiet: int = 100,
    most_slowdown: float = math.inf,
) -> list[str]:
    """Run a job through so many of these faults and print the table. Return what was wrong.

    quiet: steps before the first fault. most_slowdown: of a step, by what Foreshock does during the faults.
    """
    with ExitStack() as stack:
        if DISK_FAULTS.keys() & set(names):
            mount_disks(folder)
            stack.callback(unmount_disks, folder)
        job = Job(folder, pace)
        job.launch()
        eventually(lambda: job.look() >= quiet, "steps before the first fault")
        usual = job.durations(job.launches[0])
        began = time.monotonic()
        marks = _break(job, names, faults, random.Random(seed))
        seconds = time.monotonic() - began
        before = job.look()
        eventually(lambda: job.look() > before, "steps after the last fault")
        eventually(lambda: not job.undelivered(), "a delivery of the rings of ranks that were killed")
        job.stop.touch()
        eventually(lambda: not list(job.rings.rglob("*.ring")), "a delivery of all rings")
        job.ranks.wait()
        finished = {launch: job.durations(launch) for launch in job.launches}
        eventually(lambda: job.look() >= sum(map(len, finished.values())), "all steps")
        eventually(lambda: not job.recorder_pids(), "the end of the recorder")
        counted = int(job.look())
        runs = [name for name in job.collector.names() if name.startswith(RUN)]
        found = [job.collector.run(name) for name in runs]
        dropped = sum(sum(each["counters"]["dropped"].values()) for each in found)
        # No fault lasts so long that a training has stalled, whatever the clocks say.
        stalls = sum(incident["verdict"]["cause"] == "stalled" for each in found for incident in each["incidents"])
        job.collector.stop()
        job.proxy.close()
        job.relay.close()
        stored, partial = stored_steps(job.database), partial_steps(job.database)
        left = [str(path.relative_to(folder)) for path in job.rings.rglob("*") if path.is_file()]
        running = processes(folder)
    kept = {launch: stored.get(launch, set()) for launch in finished}
    print("\nFrom each fault to the next. In us, a step of all ranks, and the same step in rings that nobody reads:")
    print(*table(marks, finished, kept, job.regressions), sep="\n")
    print(f"{'in all':<36}{len(marks):>8}   seed {seed}, {seconds:.0f} s\n")
    lost = sum(len(set(range(1, len(steps) + 1)) - kept[launch]) for launch, steps in finished.items())
    # Ranks that are killed may have begun one more step than they have finished.
    extra = sum(len(kept[launch] - set(range(1, len(steps) + 2))) for launch, steps in finished.items())
    total = sum(map(len, stored.values()))
    figures = {
        "steps sent": sum(map(len, finished.values())),
        "stored": total,
        "lost": lost,
        "doubled": abs(counted - total) + extra,
        "without one of the ranks": partial,
        "records overwritten by faults": job.overwritten,
        "records counted as dropped": dropped,
        "counter regressions": job.regressions,
        "stalls reported": stalls,
        "rings and other files left": len(left),
        "processes left": len(running),
    }
    for what, figure in figures.items():
        print(f"{what:<36}{figure:>6}")
    faulty = finished[job.launches[0]][len(usual) :] + [d for each in job.launches[1:] for d in finished[each]]
    print(f"\n{'a step of all ranks, in us':<48}{'median':>8}{'99 %':>8}{'99.9 %':>8}")
    for words, pairs in (("before the first fault", usual), ("with faults", faulty)):
        read, unread = (quantiles(each) for each in zip(*pairs, strict=True))
        for rings, spread in (("", read), (", rings that nobody reads", unread)):
            print(f"{words + rings:<48}" + "".join(f"{1e6 * each:>8.0f}" for each in spread))
    wrong = [
        f"{figures[what]} {what}" for what in ("doubled", "counter regressions", "stalls reported") if figures[what]
    ]
    if dropped > job.overwritten:
        wrong.append(f"{dropped} records counted as dropped, and {job.overwritten} overwritten before they were stored")
    # A kill may come between two ranks of the last step.
    if partial > dropped + len(job.launches) - 1:
        wrong.append(f"{partial} steps without one of the ranks, and {dropped} records counted as dropped")
    if lost > dropped / 2:
        wrong.append(f"{lost} steps lost, and {dropped} records counted as dropped")
    slowdown = max(one / other for one, other in zip(read, unread, strict=True))
    if slowdown > most_slowdown:
        wrong.append(f"with faults, a step takes {slowdown:.1f} times as long as one that nobody reads")
    return wrong + [f"left: {each}" for each in (*left, *running)]


def _break(job: Job, names: Sequence[str], faults: int, generator: random.Random) -> list[Mark]:
    """Let each fault happen once, then random ones. Return when each began."""
    marks: list[Mark] = []
    for number in range(faults):
        name = names[number] if number < len(names) else generator.choice(names)
        before = job.look()
        # At a random moment, yet not before the last fault is over.
        eventually(lambda before=before: job.look() > before, f"steps after {len(marks)} faults")  # type: ignore[misc]
        time.sleep(generator.random() / 2)
        launch = job.launches[-1]
        marks.append(Mark(fault=name, launch=launch, steps=len(job.durations(launch)), regressions=job.regressions))
        (FAULTS | DISK_FAULTS | DATABASE_FAULTS)[name](job)
    return marks


def _enter_namespace() -> bool:
    """Start again in a mount namespace. Return whether this is one; False where none can be made."""
    if _NAMESPACE in os.environ:
        return True
    unshare = shutil.which("unshare")
    # As root of a user namespace: a user may mount there too.
    if unshare is not None and subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode == 0:
        command = [unshare, "-rm", sys.executable, "-m", "benchmarks.chaos", *sys.argv[1:]]
        os.execve(unshare, command, os.environ | {_NAMESPACE: "1"})
    return False


def main() -> None:
    """Run, and end with 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pace", type=float, default=0.01, help="seconds between steps; default: 0.01")
    parser.add_argument("--recorders", type=int, default=1000, help="that come back at once; default: 1000")
    options = parser.parse_args()
    disks = _enter_namespace()
    if not disks:
        print("no disk is filled: a mount namespace cannot be made here")
    with tempfile.TemporaryDirectory() as name:
        wrong = run(
            Path(name),
            [*FAULTS, *(DISK_FAULTS if disks else ())],
            faults=options.faults,
            seed=options.seed,
            pace=options.pace,
            quiet=_QUIET_STEPS,
            most_slowdown=_MOST_SLOWDOWN,
        )
    with tempfile.TemporaryDirectory() as name:
        wrong += run(Path(name), [*DATABASE_FAULTS], faults=_DESTROYED, seed=options.seed, pace=options.pace)
    with tempfile.TemporaryDirectory() as name:
        wrong += come_back(Path(name), recorders=options.recorders)
    for line in wrong:
        print(f"WRONG: {line}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
