"""The commands that come with the collector: found by name when they are called.

Each imports what is its own alone: an import that fails names what is missing.
"""

from __future__ import annotations

import asyncio
import os
import sys

from foreshock_collector.config import ConfigError, config_from, misspelt_variables


def collector(arguments: list[str]) -> int:
    """Serve until told to stop. 2: a setting is wrong."""
    from foreshock_collector.server import serve
    from foreshock_collector.state.store import StoreError

    try:
        config = config_from(arguments)
        for line in misspelt_variables(os.environ):
            sys.stderr.write(f"foreshock collector: {line}\n")
        asyncio.run(serve(config))
    except (ConfigError, StoreError) as error:
        sys.stderr.write(f"foreshock collector: {error}\n")
        return 2
    return 0


def demo(arguments: list[str]) -> int:
    """Show a real training job explode, survive and meet a bad batch; see `foreshock_collector.commands.demo`."""
    from foreshock_collector.commands.demo.command import main

    return main(arguments)


def diagnose(arguments: list[str]) -> int:
    """Name what happened in recorded logs; see `foreshock_collector.commands.replay`."""
    from foreshock_collector.commands.replay import main

    return main(arguments)


def report(arguments: list[str]) -> int:
    """Write a run or a log as one page; see `foreshock_collector.commands.report`."""
    from foreshock_collector.commands.report import main

    return main(arguments)


def status(arguments: list[str]) -> int:
    """Show the runs, or one; see `foreshock_collector.commands.status`."""
    from foreshock_collector.commands.status import status

    return status(arguments)


def incidents(arguments: list[str]) -> int:
    """Show what went wrong; see `foreshock_collector.commands.status`."""
    from foreshock_collector.commands.status import incidents

    return incidents(arguments)
