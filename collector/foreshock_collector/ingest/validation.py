"""What the collector checks of a hello, and how it makes its names fit to be shown."""

from __future__ import annotations

import math

from foreshock_collector.ingest.session import RefusedError
from foreshock_collector.text import NAME_LENGTH, PATH_LENGTH, identifier, printable
from foreshock_protos import SCHEMA_VERSION
from foreshock_protos.v1 import telemetry_pb2 as pb

_MOST_RANKS = 65_536
_MOST_LAYERS = 65_536
"""Several times what the largest mixtures of experts have; the collector keeps numbers and names of each."""


def check_instance(name: str) -> None:
    """Raise `RefusedError` for the name of an instance that no probe makes."""
    if not 0 < len(name) <= NAME_LENGTH:
        raise RefusedError(f"hello.instance must have 1 to {NAME_LENGTH} characters, it has {len(name)}")
    if not name.isprintable():
        raise RefusedError("hello.instance holds characters that cannot be printed")


def check_version(hello: pb.Hello) -> None:
    """Raise `RefusedError` unless the recorder uses a version of the contract that this collector understands."""
    if not 1 <= hello.schema_version <= SCHEMA_VERSION:
        raise RefusedError(
            f"the recorder uses schema version {hello.schema_version}, the collector supports versions up "
            f"to {SCHEMA_VERSION}: install the same release of foreshock on both",
            reason="schema_version",
        )


def validated(hello: pb.Hello) -> pb.Hello:
    """Return the hello with names that can be printed and are not too long. Raises `RefusedError`."""
    for name in ("run", "experiment", "launch_id"):
        if not getattr(hello, name):
            raise RefusedError(f"hello.{name} is empty")
    if not math.isfinite(hello.started_seconds):
        raise RefusedError("hello.started_seconds is not a time")
    place, model = hello.topology, hello.model
    if not place.rank < place.world_size <= _MOST_RANKS:
        raise RefusedError(f"hello.topology: rank {place.rank} of world_size {place.world_size}")
    parameters, layers = len(model.parameters), len(model.layers)
    if layers > _MOST_LAYERS:
        raise RefusedError(f"hello.model has {layers} layers, the limit is {_MOST_LAYERS}", reason="limit")
    for name in ("parameter_sizes", "parameter_layers"):
        if len(getattr(model, name)) != parameters:
            raise RefusedError(f"hello.model: {len(getattr(model, name))} {name} for {parameters} parameters")
    if any(layer >= layers for layer in model.parameter_layers):
        raise RefusedError(f"hello.model: parameter_layers points beyond the {layers} layers")
    shown = pb.Hello()
    shown.CopyFrom(hello)
    shown.run, shown.experiment = identifier(hello.run), identifier(hello.experiment)
    shown.launch_id = identifier(hello.launch_id)
    shown.clip = printable(hello.clip, NAME_LENGTH)
    shown.topology.node = printable(place.node, NAME_LENGTH)
    shown.optimizer.type = printable(hello.optimizer.type, NAME_LENGTH)
    shown.model.type = printable(model.type, NAME_LENGTH)
    shown.model.parameters[:] = [printable(name, PATH_LENGTH) for name in model.parameters]
    shown.model.layers[:] = [printable(name, PATH_LENGTH) for name in model.layers]
    shown.model.module_types.clear()
    for kind, count in model.module_types.items():
        shown.model.module_types[printable(kind, PATH_LENGTH)] = count
    shown.versions.clear()
    for name, version in hello.versions.items():
        shown.versions[printable(name, NAME_LENGTH)] = printable(version, NAME_LENGTH)
    return shown
