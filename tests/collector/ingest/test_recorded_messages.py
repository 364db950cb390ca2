"""Agents of other versions: what each version of the contract has sent is stored as if this one had sent it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from foreshock_collector.server import Server
from foreshock_protos import SCHEMA_VERSION
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.recorded_messages import FOLDER, RANKS, RUN, STEPS, recorded
from tests.support.streams import Stream, config, families, serving, value

FILES = sorted(FOLDER.glob("schema_*.txt"))
_UNKNOWN = b"\xca\x3e\x05later"
"""Field 1001, as a newer version of any message may have it."""
_KIND = b"\xd2\x3e\x05later"
"""Nothing but field 1002: a message of a kind that is unknown here."""


def newer(messages: list[bytes]) -> list[bytes]:
    """The same as an agent would send that has more to say."""
    found = []
    for data in messages:
        message: Any = pb.FromRecorder.FromString(data)
        inner = getattr(message, message.WhichOneof("message"))
        inner.MergeFromString(_UNKNOWN)
        if message.HasField("hello"):
            inner.capabilities.append("later")
            inner.topology.MergeFromString(_UNKNOWN)
            inner.model.MergeFromString(_UNKNOWN)
        found += [message.SerializeToString() + _UNKNOWN, _KIND]
    assert sum(data.count(b"later") for data in found) > 2 * len(messages)
    return found


def stored(tmp_path: Path, messages: list[bytes]) -> dict[str, list[Any]]:
    """Return the columns of the steps that a collector has once it has acknowledged these messages."""
    found: dict[str, list[Any]] = {}

    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            await stream.send(*messages)
            while True:
                positions = await stream.positions(RANKS)
                if all(position.sequence == STEPS and position.closed for position in positions):
                    break
            await stream.close()
            said = await families(server)
            assert value(said, "foreshock_steps") == STEPS
            assert value(said, "foreshock_nonfinite_steps", source="gradient", kind="nan") == 1
            assert {sample.value for sample in said["foreshock_records_dropped"].samples} == {0.0}
            columns = server.store.steps(RUN, attempt=0, after=0, limit=100)
            # Each recording has its own times.
            found.update({name: list(column) for name, column in columns.items() if "seconds" not in name})

    serving(test())
    return found


def test_what_each_version_has_recorded_is_kept() -> None:
    assert [path.stem for path in FILES] == [f"schema_{version}" for version in range(1, SCHEMA_VERSION + 1)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_messages_of_an_older_agent_are_stored_as_those_of_this_version(tmp_path: Path, path: Path) -> None:
    found = stored(tmp_path, recorded(path))
    norms = found["global_norm"]
    assert found["step"] == [100 + sequence for sequence in range(1, STEPS + 1)]
    assert norms[:-1] == pytest.approx([sequence + 0.01 for sequence in range(1, STEPS)])
    assert norms[-1] is None or math.isnan(norms[-1])
    assert set(found["loss"]) == {0.25}
    (tmp_path / "other").mkdir()
    assert repr(found) == repr(stored(tmp_path / "other", recorded(FILES[-1])))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_only_a_newer_agent_says_costs_nothing_of_the_rest(tmp_path: Path, path: Path) -> None:
    (tmp_path / "newer").mkdir()
    assert repr(stored(tmp_path / "newer", newer(recorded(path)))) == repr(stored(tmp_path, recorded(path)))
