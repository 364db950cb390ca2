"""The command `foreshock doctor`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import entry_points

from foreshock_recorder.address import address_of
from foreshock_recorder.doctor.clock import clock, http_address
from foreshock_recorder.doctor.finding import Finding, exit_code, fail, lines, warn
from foreshock_recorder.doctor.machine import (
    folder_of_rings,
    launches,
    proxy,
    recorder,
    rings_left,
    shared_memory,
    versions,
)
from foreshock_recorder.doctor.training import training
from foreshock_recorder.paths import ring_base

_EPILOG = "Exit code: 0 if every check is ok or a warning, 1 if one failed, 2 for wrong usage."


def main(arguments: list[str] | None = None) -> int:
    """Check this machine, and the way to the collector. Exit code 0: nothing failed; 1: something has."""
    parser = argparse.ArgumentParser(
        prog="foreshock doctor",
        description="Check whether trainings on this machine can be watched, or whether a collector works here and is "
        "watched itself, and say what to do.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "machine",
        nargs="?",
        choices=("training", "collector"),
        default="training",
        help="what runs here (default: training)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per check, one per line")
    default = os.environ.get("FORESHOCK_COLLECTOR", "")
    of_training = parser.add_argument_group("on a machine that trains")
    of_training.add_argument(
        "--collector", metavar="HOST:PORT", default=default, help="default: FORESHOCK_COLLECTOR, or this machine"
    )
    of_collector = parser.add_argument_group("on the collector's machine")
    of_collector.add_argument("--config", metavar="FILE", default="", help="the collector's file of settings")
    of_collector.add_argument("--prometheus-url", metavar="URL", default="", help="the Prometheus that scrapes it")
    options = parser.parse_args(arguments)
    if options.machine == "training" and (options.config or options.prometheus_url):
        parser.error("--config and --prometheus-url are for: foreshock doctor collector")
    try:
        address = address_of(options.collector)
    except ValueError as error:
        parser.error(f"argument --collector: {error}")
    if options.machine == "training":
        findings = checks(address)
    else:
        findings = _of_collector(options.config, options.prometheus_url)
    found = []
    for finding in findings:
        found.append(finding)
        # Each at once: some take seconds.
        shown = [json.dumps(asdict(finding))] if options.json else lines([finding])
        sys.stdout.write("".join(f"{line}\n" for line in shown))
        sys.stdout.flush()
    return exit_code(found)


def _of_collector(settings: str, prometheus_url: str) -> Iterator[Finding]:
    """Yield what the collector's package finds, which the recorder's may not import."""
    entries = entry_points(group="foreshock.doctor", name="collector")
    if not entries:
        yield fail("versions", "this installation has no collector to check", "install foreshock again")
    for entry in entries:
        yield from entry.load()(settings, prometheus_url)


def checks(collector: str) -> Iterator[Finding]:
    """Yield the result of each check of a machine that trains. collector: host:port."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    yield versions(os.environ)
    yield from training(sys.executable)
    yield folder_of_rings(ring_base())
    yield shared_memory(ring_base())
    yield rings_left(launches())
    yield recorder(os.environ.get("FORESHOCK_RECORDER_PYTHON") or sys.executable)
    yield proxy(os.environ)
    yield _collector(collector)
    yield clock(http_address(collector, os.environ))


def _collector(address: str) -> Finding:
    try:
        # Imports gRPC, which an environment whose recorder runs in another one need not have.
        from foreshock_recorder.doctor.collector import answers
    except Exception as error:
        # A broken installation raises anything.
        advice = "run foreshock doctor with the recorder's interpreter too, or pip install grpcio protobuf"
        return warn("collector", f"not checked: gRPC cannot be imported here: {error}", advice)
    return asyncio.run(answers(address))
