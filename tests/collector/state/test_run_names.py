"""One name, several trainings: what restarts is the next attempt, what runs at the same time is a run of its own."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from foreshock_collector.server import Server
from foreshock_collector.state.fleet import Runs
from foreshock_collector.state.instances import Instance
from foreshock_collector.state.runs import ContradictionError
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.streams import Stream, config, hello, serving, steps

NOW = 1e9


class Names:
    """A collector's runs, and ranks that say hello."""

    def __init__(self) -> None:
        self.runs = Runs()
        self.now = NOW

    def register(self, launch: str, *, rank: int = 0, after: float = 0.0, **changes: Any) -> tuple[str, int]:
        """Name of the run, number of the attempt."""
        self.now += after
        place = pb.Topology(rank=rank, world_size=2)
        said: dict[str, Any] = {"run": "night", "instance": f"{launch}-{rank}", "launch_id": launch, "topology": place}
        self.runs.register(hello(**(said | {"started_seconds": self.now} | changes)).hello, self.now)
        run, instance = self.find(f"{launch}-{rank}")
        return run, instance.attempt

    def find(self, instance: str) -> tuple[str, Instance]:
        found = self.runs.find(instance)
        assert found is not None
        return found[0].name, found[1]

    def leave(self, instance: str, reason: pb.ExitReason) -> None:
        found = self.runs.find(instance)
        assert found is not None
        found[0].close(found[1], pb.Exit(instance=instance, reason=reason), self.now)


def test_a_second_living_launch_of_a_name_becomes_a_run_of_its_own_with_all_its_ranks() -> None:
    names = Names()
    assert names.register("a") == ("night", 0)
    assert names.register("b", after=1.0) == ("night-2", 0)
    assert names.register("c", after=1.0) == ("night-3", 0)
    assert names.register("a", rank=1) == ("night", 0)
    assert names.register("b", rank=1) == ("night-2", 0)
    assert names.register("c", rank=1) == ("night-3", 0)
    assert names.register("b", after=100.0) == ("night-2", 0)


@pytest.mark.parametrize(
    "reason", [pb.ExitReason.FINISHED, pb.ExitReason.EXCEPTION, pb.ExitReason.LOST, pb.ExitReason.INTERRUPTED]
)
def test_a_restart_is_the_next_attempt_however_the_last_one_ended(reason: pb.ExitReason) -> None:
    names = Names()
    names.register("a")
    names.leave("a-0", reason)
    assert names.register("b", after=0.5) == ("night", 1)


def test_a_launch_of_which_one_rank_still_reports_is_alive() -> None:
    names = Names()
    names.register("a")
    names.register("a", rank=1)
    names.leave("a-0", pb.ExitReason.LOST)
    assert names.register("b", after=0.5) == ("night-2", 0)


def test_a_launch_that_fell_silent_gives_its_name_back_after_ten_seconds() -> None:
    names = Names()
    names.register("a")
    assert names.register("b", after=10.0) == ("night", 1)


def test_a_launch_known_to_be_lost_gives_its_name_back_at_once() -> None:
    names = Names()
    names.register("a")
    found = names.runs.find("a-0")
    assert found is not None
    found[0].record_event(found[1], pb.Event(instance="a-0", kind=pb.Event.RANK_LOST), names.now)
    assert names.register("b", after=0.5) == ("night", 1)


def test_what_is_handed_in_afterwards_belongs_to_the_run_of_its_name_and_takes_it_from_nobody() -> None:
    names = Names()
    assert names.register("new") == ("night", 0)
    assert names.register("old", exited=True) == ("night", 1)
    assert names.register("older", exited=True) == ("night", 2)
    names.leave("new-0", pb.ExitReason.FINISHED)
    assert names.register("next") == ("night", 3)


def test_a_run_that_was_called_name_2_on_purpose_is_left_alone() -> None:
    names = Names()
    assert names.register("a", run="night-2") == ("night-2", 0)
    names.leave("a-0", pb.ExitReason.FINISHED)
    assert names.register("b") == ("night", 0)
    assert names.register("c", after=1.0) == ("night-3", 0)
    names.leave("c-0", pb.ExitReason.EXCEPTION)
    assert names.register("d", after=1.0) == ("night-3", 1)
    # A job of that name may also be resumed by it.
    assert names.register("e", run="night-3", after=60.0) == ("night-3", 2)


def test_a_rank_that_has_gone_while_the_collector_was_away_does_not_keep_its_name() -> None:
    names = Names()
    names.register("a")
    # Its recorder is back, and the goodbye comes behind all that the ring holds.
    names.register("a", exited=True, after=60.0)
    assert names.register("b", after=0.5) == ("night", 1)


def test_another_experiment_gets_a_run_of_its_own_even_later() -> None:
    names = Names()
    names.register("a")
    assert names.register("b", experiment="other", after=1000.0) == ("night-2", 0)
    assert names.register("c", after=1000.0) == ("night", 1)
    assert names.register("d", experiment="other", after=1000.0) == ("night-2", 1)


def test_a_launch_that_contradicts_itself_is_refused() -> None:
    names = Names()
    names.register("a")
    for changes, says in (
        ({"experiment": "other"}, "experiment 'other': this launch has reported 'e' before"),
        ({"topology": pb.Topology(rank=1, world_size=3)}, "world_size 3"),
        ({"rank": 0, "instance": "another"}, "rank 0 of this launch is another instance already"),
    ):
        with pytest.raises(ContradictionError, match=says):
            names.register("a", **({"rank": 1} | changes))
    with pytest.raises(ContradictionError, match="another experiment, run, launch or rank before"):
        names.register("a", run="day")


def test_after_a_restart_a_launch_finds_its_run_again_and_is_told_its_name(tmp_path: Path) -> None:
    async def test() -> None:
        async with Server(config(tmp_path)) as server:
            streams = []
            for launch, name in (("a", "r"), ("b", "r-2")):
                stream = Stream(server)
                streams.append(stream)
                await stream.send(hello(launch_id=launch, instance=launch), steps(1, [1.0] * 3, instance=launch))
                assert (await stream.call.read()).positions[0].run == name
                await stream.stored(3)
            for stream in streams:
                await stream.close()
        async with Server(config(tmp_path)) as server:
            stream = Stream(server)
            await stream.send(hello(launch_id="b", instance="b"), steps(4, [1.0] * 3, instance="b"))
            assert (await stream.call.read()).positions[0].run == "r-2"
            await stream.stored(6)
            await stream.close()

    serving(test())


@pytest.mark.parametrize(
    ("changes", "url"),
    [
        ({}, "http://127.0.0.1:{port}"),
        ({"host": "0.0.0.0", "allow_unauthenticated": True}, f"http://{socket.gethostname()}:{{port}}"),
        ({"host": "::", "allow_unauthenticated": True}, f"http://{socket.gethostname()}:{{port}}"),
        ({"public_url": "https://foreshock.example.org/"}, "https://foreshock.example.org"),
    ],
)
def test_the_page_is_told_at_an_address_that_people_can_open(tmp_path: Path, changes: dict[str, Any], url: str) -> None:
    async def test() -> None:
        async with Server(config(tmp_path, **changes)) as server:
            assert server.public_url == url.format(port=server.http_port)

    serving(test())
