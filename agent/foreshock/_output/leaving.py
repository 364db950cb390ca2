"""How a rank leaves: which exit its ring reports, and when.

No signal is taken in Python: a rank that waits in a collective would no longer die of it. faulthandler's handler is C,
writes the stack into a file beside the ring, and lets the process die at once.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from foreshock._output.recorder_process import RecorderProcess
from foreshock_recorder.layout import ExitReason
from foreshock_recorder.ring import Ring


class Ending(NamedTuple):
    """Says how a rank leaves, and why."""

    reason: ExitReason
    detail: str = ""


class Leaver(Protocol):
    """Watches a training of this process, and reports how it ends."""

    enabled: bool
    """Whether it watches and clips."""
    idle: bool
    """Whether another training of this process steps, and this one does not."""
    steps: int
    """How many it has seen."""
    run: str
    """Name of its run, by which the ranks have attached."""

    def leave(self, ending: Ending, *, wait: bool = True) -> None:
        """Report the exit, once. wait: for the last acknowledgement."""

    def leave_at_exit(self) -> None:
        """The interpreter ends."""

    def pause(self) -> None:
        """Become idle, until its next step."""

    def watches(self, which: object) -> bool:
        """This is its model, or its optimizer."""

    def go_inert(self) -> None:
        """This is a forked copy of the rank."""


class _Exits:
    """Keeps what `sys.exit` was called with, and the exception that was being handled: both are lost at the end."""

    def __init__(self) -> None:
        self._theirs: Callable[..., Any] | None = None
        self.called: tuple[Any, BaseException | None] | None = None
        self._before: BaseException | None = None
        """Raised before we came: not this run's end."""

    def watch(self) -> None:
        """From the first attach on."""
        self.called, self._before = None, _last_error()
        if self._theirs is None:
            self._theirs, sys.exit = sys.exit, self._exit

    def let_go(self) -> None:
        """After the last watch has left."""
        # An exception keeps all that its frames hold: a model, and what lies on its device.
        self.called = self._before = None
        if self._theirs is not None and sys.exit == self._exit:
            sys.exit, self._theirs = self._theirs, None

    def _exit(self, status: Any = None, /) -> Any:
        self.called = status, sys.exc_info()[1]
        assert self._theirs is not None
        return self._theirs(status)

    def ending(self) -> Ending:
        """Why the interpreter ends, as far as it can be known by what has gone before."""
        if self.called is not None:
            status, handled = self.called
            if isinstance(handled, KeyboardInterrupt) or (handled is not None and exit_code(status)):
                return ending_by(handled)
            return _ending_with(status)
        error = _last_error()
        # At a prompt an error ends nothing.
        if error is None or error is self._before or hasattr(sys, "ps1"):
            return Ending(ExitReason.FINISHED)
        return ending_by(error)


def ending_by(error: BaseException) -> Ending:
    """Return the ending by an uncaught exception."""
    if isinstance(error, KeyboardInterrupt):
        return Ending(ExitReason.INTERRUPTED, "KeyboardInterrupt")
    if isinstance(error, SystemExit):
        handled = error.__context__
        if isinstance(handled, KeyboardInterrupt) or (isinstance(handled, Exception) and exit_code(error.code)):
            return ending_by(handled)
        return _ending_with(error.code)
    if isinstance(error, GeneratorExit):
        return Ending(ExitReason.DETACHED)
    return Ending(ExitReason.EXCEPTION, f"{type(error).__name__}: {error}")


def exit_code(status: Any) -> int:
    """Return the exit code of `sys.exit(status)`."""
    if status is None or isinstance(status, int):
        return int(status or 0)
    return 1


def _ending_with(status: Any) -> Ending:
    code = exit_code(status)
    if not code:
        return Ending(ExitReason.FINISHED)
    text = "" if isinstance(status, int) else f": {status}"
    return Ending(ExitReason.EXCEPTION, f"exit code {code}{text}")


def _last_error() -> BaseException | None:
    error: BaseException | None = getattr(sys, "last_value", None)
    return error


class _Stack:
    """Writes the stack when SIGTERM comes: into one file, linked beside each ring."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._paths: set[Path] = set()

    def keep(self, path: Path) -> None:
        """Also beside this ring. Not where SIGTERM is somebody's already."""
        with suppress(OSError, ValueError, RuntimeError):
            if self._file is None:
                if not _is_ours_to_take(signal.SIGTERM):
                    return
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                self._file = os.fdopen(descriptor, "w")
                faulthandler.register(signal.SIGTERM, file=self._file, all_threads=False, chain=True)
            else:
                path.hardlink_to(next(iter(self._paths)))
            self._paths.add(path)

    def drop(self, path: Path) -> None:
        """Forget the stack file of a rank that has reported its exit."""
        if path in self._paths:
            self._paths.discard(path)
            with suppress(OSError):
                path.unlink()
            if not self._paths:
                self.let_go()

    def let_go(self) -> None:
        """Take the handler away, unless somebody has put theirs in its place since."""
        file, self._file = self._file, None
        if file is None:
            return
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            faulthandler.unregister(signal.SIGTERM)
            file.close()
        else:
            # faulthandler still knows its number, which must not become another file's.
            _kept.append(file)


def _is_ours_to_take(number: signal.Signals) -> bool:
    """Nobody handles it, neither in Python nor in C."""
    if signal.getsignal(number) is not signal.SIG_DFL:
        return False
    status = Path("/proc/self/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return not int(caught.split()[1], 16) >> (number - 1) & 1


_ONE_END_SECONDS = 1.0
"""A training that ends so shortly before its process ends with it."""
_unconfirmed: list[tuple[float, Ring, RecorderProcess]] = []
"""Endings reported without a wait, and when."""
_kept: list[TextIO] = []
exits = _Exits()
_stack = _Stack()
_here: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""All that have arrived, and their number in order."""
_steps_before: weakref.WeakKeyDictionary[Any, dict[int, int]] = weakref.WeakKeyDictionary()
"""For each: how many steps the others had seen at its last call of `pause_others`, by their numbers."""
_process = 0
"""Process whose end calls us: a forked one needs a finalizer of its own."""


def stack_path(ring: Path) -> Path:
    """The file beside a ring that has something in it if SIGTERM ended the rank."""
    return ring.with_suffix(".stack")


def arrived(leaver: Leaver, ring: Path) -> None:
    """Call it at the end from now on."""
    global _process
    if _process != os.getpid():
        _process = os.getpid()
        # A finalizer of multiprocessing runs at the end of spawned processes too, where atexit does not.
        Finalize(None, _leave_all, exitpriority=100)
    exits.watch()
    _stack.keep(stack_path(ring))
    _here[leaver] = max(_here.values(), default=0) + 1


def report(ring: Ring, recorder: RecorderProcess, ending: Ending, *, wait: bool) -> None:
    """Write the exit into the ring. wait: for its acknowledgement, two seconds at most."""
    # It has counted as finished for long: no recorder has to come back for it.
    delivered = ring.idle and ring.exit_acknowledged and ring.acknowledged >= ring.begun
    # What ends the process meanwhile is the end of the training that steps.
    ring.write_exit(*(Ending(ExitReason.FINISHED) if ring.idle else ending))
    _stack.drop(stack_path(ring.path))
    if wait and not any(each.enabled for each in present()):
        exits.let_go()
    if delivered:
        with suppress(OSError):
            ring.path.unlink()
    elif wait:
        recorder.ensure()
        recorder.wait_for_exit(ring)
    else:
        now = time.monotonic()
        # An older one is not waited for at the end, and its ring is memory and a descriptor that others need.
        _unconfirmed[:] = [*(each for each in _unconfirmed if now - each[0] < _ONE_END_SECONDS), (now, ring, recorder)]


def pause_others(stepping: Leaver) -> None:
    """Pause each training of this process that has made no step since the last call for this one, which steps.

    It may have ended, as in a sweep, or wait for its turn, as a GAN's generator does.
    """
    before, now = _steps_before.get(stepping, {}), {}
    for other, number in list(_here.items()):
        if other is stepping or not other.enabled or other.idle:
            continue
        now[number] = other.steps
        if 0 < other.steps == before.get(number):
            other.pause()
    _steps_before[stepping] = now


def is_watched(which: object) -> bool:
    """A watch of this model or optimizer has not been detached, and is not idle."""
    return any(each.enabled and not each.idle and each.watches(which) for each in present())


def detach_all() -> None:
    """Detach each watch."""
    for each in present():
        each.leave(Ending(ExitReason.DETACHED))


def runs_in_use() -> set[str]:
    """Return the names of the runs of this process whose trainings are not idle."""
    return {each.run for each in present() if each.enabled and not each.idle}


def make_room(*those: object) -> None:
    """Detach idle watches of a model or optimizer that is attached again."""
    for each in present():
        if each.idle and any(each.watches(which) for which in those):
            each.leave(Ending(ExitReason.FINISHED), wait=False)


def with_model(leaver: Leaver) -> Callable[[object], None]:
    """For the end of its model: the training is over."""
    mine = weakref.ref(leaver)

    def end(_: object) -> None:
        leaver = mine()
        # Once the interpreter has taken modules apart, all have left.
        if leaver is not None and leaver.enabled:
            leaver.leave(ending_of_model(), wait=False)

    return end


def present() -> list[Any]:
    """All that have arrived and are not forgotten, in no order."""
    return list(_here)


def ending_of_model() -> Ending:
    """Why a training ends whose model or optimizer goes. An exception that is being handled there is not its own."""
    return exits.ending()


def ending_now() -> Ending:
    """Why the interpreter ends."""
    error = sys.exc_info()[1]
    # Of a spawned process, where finalizers run while it is on its way.
    return exits.ending() if error is None else ending_by(error)


def _leave_all() -> None:
    now, ending = time.monotonic(), ending_now()
    for leaver in present():
        leaver.leave_at_exit()
    for reported, ring, recorder in _unconfirmed:
        if now - reported < _ONE_END_SECONDS:
            # What a function holds goes when it returns, a moment before its process does: both are one end.
            report(ring, recorder, ending, wait=True)


def _go_inert() -> None:
    for leaver in present():
        leaver.go_inert()
    _stack.let_go()
    _stack._paths.clear()
    exits.let_go()
    _unconfirmed.clear()


# A DataLoader's worker is a copy of the rank: it must neither write into the rank's ring nor report an exit for it.
os.register_at_fork(after_in_child=_go_inert)
