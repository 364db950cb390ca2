"""The checks of `foreshock doctor collector`, in their order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from foreshock_collector.commands.doctor import machine, service
from foreshock_collector.commands.doctor.prometheus import prometheus
from foreshock_collector.config import ConfigError, config_from
from foreshock_recorder.doctor.finding import Finding, fail


def checks(settings: str, prometheus_url: str) -> Iterator[Finding]:
    """Yield the result of each check.

    settings: the collector's TOML file; empty without one. prometheus_url: address of Prometheus; empty if unknown.
    """
    yield machine.versions()
    try:
        config = config_from(["--config", settings] if settings else [])
    except ConfigError as error:
        yield fail("settings", str(error), "correct it: the collector would not start")
        return
    yield from machine.settings(os.environ)
    yield machine.proxy(config, os.environ)
    answers, page = service.page(config)
    yield page
    yield service.records(config)
    if answers:
        yield service.version(config)
    path = Path(config.database)
    yield machine.database(path, answers=answers)
    yield machine.disk(path, config.database_gigabytes)
    yield service.notifications(config)
    yield from prometheus(prometheus_url, config)
