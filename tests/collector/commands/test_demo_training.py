"""The demo leaves no process behind: its training has ended only when the recorder's process has."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from foreshock_collector.commands.demo.training import _is_served, _recorder_exited
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration


def test_a_recorder_that_has_removed_its_folder_is_waited_for_until_its_process_is_gone(tmp_path: Path) -> None:
    rings = tmp_path / "rings"
    command = [sys.executable, "-c", "input()", "--folder", str(rings / "explodes" / "first")]
    recorder = subprocess.Popen(command, stdin=subprocess.PIPE)
    # A process that has just been started has no command line for a moment.
    eventually(lambda: _is_served(rings), "a process with this folder")

    async def wait() -> None:
        waiting = asyncio.create_task(_recorder_exited(rings))
        finished, _ = await asyncio.wait({waiting}, timeout=0.5)
        assert not finished
        recorder.communicate(b"\n")
        await waiting

    asyncio.run(wait())
    assert recorder.returncode == 0
