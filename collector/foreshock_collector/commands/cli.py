"""Entry points of the collector's commands.

Each imports its own modules only when it runs, so that a failing import names the missing package.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from foreshock_collector.config import ConfigError, config_from, misspelled_variables
from foreshock_collector.log_format import configure_logging

logger = logging.getLogger(__name__)


def collector(arguments: list[str]) -> int:
    """Serve until stopped. Return 2 if a setting is invalid, 1 if the collector failed."""
    from foreshock_collector.server import serve
    from foreshock_collector.state.database_file import StoreError

    try:
        config = config_from(arguments)
    except ConfigError as error:
        sys.stderr.write(f"foreshock collector: {error}\n")
        return 2
    configure_logging(config.log_format)
    for line in misspelled_variables(os.environ):
        logger.warning("%(warning)s", {"warning": line})
    try:
        asyncio.run(serve(config))
    except (ConfigError, StoreError) as error:
        logger.error("cannot start: %(error)s", {"error": str(error)})
        return 2
    except Exception as error:
        logger.exception("failed: %(error)s", {"error": str(error)})
        return 1
    return 0


def demo(arguments: list[str]) -> int:
    """Run the demo; see `foreshock_collector.commands.demo`."""
    from foreshock_collector.commands.demo.command import main

    return main(arguments)


def diagnose(arguments: list[str]) -> int:
    """Diagnose recorded logs; see `foreshock_collector.commands.replay`."""
    from foreshock_collector.commands.replay import main

    return main(arguments)


def report(arguments: list[str]) -> int:
    """Write a report on a run or a log; see `foreshock_collector.commands.report`."""
    from foreshock_collector.commands.report import main

    return main(arguments)


def backup(arguments: list[str]) -> int:
    """Copy a database; see `foreshock_collector.commands.backup`."""
    from foreshock_collector.commands.backup import main

    return main(arguments)


def notify(arguments: list[str]) -> int:
    """Send a test notification; see `foreshock_collector.commands.notify`."""
    from foreshock_collector.commands.notify import main

    return main(arguments)


def files(arguments: list[str]) -> int:
    """Print or copy the installed files; see `foreshock_collector.commands.files`."""
    from foreshock_collector.commands.files import main

    return main(arguments)


def status(arguments: list[str]) -> int:
    """Show all runs or one; see `foreshock_collector.commands.status`."""
    from foreshock_collector.commands.status import status

    return status(arguments)


def incidents(arguments: list[str]) -> int:
    """Show incidents; see `foreshock_collector.commands.status`."""
    from foreshock_collector.commands.status import incidents

    return incidents(arguments)
