"""What becomes an incident, when it is judged anew, and when it is over. Records come as a stream brings them."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from foreshock_collector.rules import DEFAULT, Rules
from foreshock_collector.runs import Run, Runs
from foreshock_collector.store import Store
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.collector.test_service import hello, steps

NAN = math.nan
FAST = DEFAULT.with_overrides({"faults": {"vanishing_steps": 30, "divergence_steps": 40}})
RANK_COLUMNS = pb.LOSS_OBSERVED | pb.LOCAL_NORMS


class Job:
    """A run of some ranks, told to a collector's state without a network."""

    def __init__(self, ranks: int = 2, layers: int = 0, rules: Rules = FAST) -> None:
        self.runs = Runs(lambda _: rules)
        self.now = 1000.0
        self.layers = layers
        self.sent = [0] * ranks
        names = [f"layer{i}" for i in range(layers)]
        model = pb.ModelSummary(layers=names, parameters=names, parameter_sizes=[1] * layers)
        model.parameter_layers.extend(range(layers))
        for rank in range(ranks):
            place = pb.Topology(world_size=ranks, rank=rank)
            self.runs.greet(hello(instance=f"r-{rank}", topology=place, model=model).hello, self.now)

    @property
    def run(self) -> Run:
        found = self.runs.get("r")
        assert found is not None
        return found

    def tell(self, rank: int, norms: list[float], *, layer_norms: list[float] | None = None, **columns: Any) -> None:
        """Steps of one rank."""
        count = len(norms)
        told: dict[str, Any] = {"flags": [RANK_COLUMNS] * count, "loss": [2.0] * count, "local_norm": norms}
        batch = steps(self.sent[rank] + 1, norms, instance=f"r-{rank}", **(told | columns)).steps
        if layer_norms is not None:
            batch.global_layer_norms.extend(layer_norms)
        self.sent[rank] += count
        home = self.runs.home(f"r-{rank}")
        assert home is not None
        for _ in self.run.take(home[1], batch, self.now):
            pytest.fail("so few steps need no room")

    def train(self, count: int, *, norm: float = 1.0, loss: list[float] | None = None, alike: bool = False) -> None:
        """Healthy steps on every rank; alike: all see the same data."""
        rng = random.Random(self.sent[0])
        norms = [norm * math.exp(rng.gauss(0, 0.05)) for _ in range(count)]
        for rank in range(len(self.sent)):
            local = norms if alike else [1.5 * n * math.exp(rng.gauss(0, 0.1)) for n in norms]
            self.tell(rank, norms, local_norm=local, loss=[2.0] * count if loss is None else loss)
        self.settle(1.0)

    def settle(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.run.settle(self.now)

    def event(self, rank: int, kind: pb.Event.Kind, seconds: float = 0.0) -> None:
        home = self.runs.home(f"r-{rank}")
        assert home is not None
        told = pb.Event(instance=f"r-{rank}", kind=kind, wall_seconds=self.now + seconds)
        self.run.happened(home[1], told, self.now)

    def leave(self, rank: int, reason: pb.Goodbye.Reason, detail: str = "") -> None:
        home = self.runs.home(f"r-{rank}")
        assert home is not None
        goodbye = pb.Goodbye(instance=f"r-{rank}", reason=reason, detail=detail, last_sequence=self.sent[rank])
        self.run.leave(home[1], goodbye, self.now)

    def hear(self) -> None:
        for rank in range(len(self.sent)):
            home = self.runs.home(f"r-{rank}")
            assert home is not None
            self.run.hear(home[1], self.now)

    def causes(self, *, only_open: bool = False) -> list[str]:
        kept = self.run.incidents.kept
        return [i["verdict"]["cause"] for i in kept if not only_open or i["closed_seconds"] is None]


def test_a_failure_is_one_incident_however_many_ranks_and_steps_and_ends_after_enough_good_ones() -> None:
    job = Job(ranks=3)
    job.train(60)
    for _ in range(4):
        for rank in range(3):
            job.tell(rank, [NAN], loss=[NAN], local_nan_parameters=[3.0])
        job.settle(1.0)
    (incident,) = job.run.incidents.kept
    assert (incident["verdict"]["first_bad_step"], incident["last_bad_step"], incident["bad_steps"]) == (60, 63, 4)
    assert incident["updated_seconds"] > incident["opened_seconds"]
    job.train(DEFAULT.recovered_after - 1)
    assert job.causes(only_open=True) == ["sudden_nonfinite"]
    job.train(1)
    assert job.causes(only_open=True) == []
    assert sum(job.run.totals.incidents.values()) == 1


def test_a_rank_that_tells_late_what_it_did_changes_the_verdict() -> None:
    job = Job(ranks=2)
    job.train(60)
    job.tell(0, [NAN], loss=[2.0])
    job.settle(5.0)
    (incident,) = job.run.incidents.kept
    assert (incident["verdict"]["cause"], incident["verdict"]["rank"]) == ("nonfinite_gradient", None)
    job.tell(1, [NAN], loss=[2.0], local_nan_parameters=[3.0])
    job.settle(1.0)
    (incident,) = job.run.incidents.kept
    assert (incident["verdict"]["cause"], incident["verdict"]["rank"]) == ("bad_rank", 1)
    assert job.run.totals.incidents["bad_rank"] == job.run.totals.incidents["nonfinite_gradient"] == 1


def test_ranks_that_see_the_same_data_are_named_once_until_they_no_longer_do() -> None:
    job = Job(ranks=4)
    job.train(100)
    assert job.causes() == []
    job.train(60, alike=True)
    job.train(5)
    job.train(60, alike=True)
    assert job.causes() == ["duplicate_data"]
    (incident,) = job.run.incidents.kept
    assert incident["verdict"]["first_bad_step"] == 100
    assert "DistributedSampler" in incident["verdict"]["try"][0]
    job.train(60)
    assert job.causes(only_open=True) == []


def test_a_rank_out_of_all_proportion_is_a_bad_one_though_nothing_is_infinite() -> None:
    job = Job(ranks=3)
    job.train(60)
    assert job.causes() == []
    for rank in range(3):
        job.tell(rank, [1.0] * 60, local_norm=[40.0 if rank == 1 else 1.0 + 0.1 * rank] * 60)
    job.settle(1.0)
    (incident,) = job.run.incidents.kept
    verdict = incident["verdict"]
    assert (verdict["cause"], verdict["rank"], verdict["first_bad_step"]) == ("bad_rank", 1, 60)
    assert verdict["runbook"] == "ForeshockSuddenNonFinite"


def test_one_rank_is_never_its_own_duplicate() -> None:
    job = Job(ranks=1)
    job.train(100, alike=True)
    assert job.causes() == []


def test_a_layer_that_gets_no_gradient_to_speak_of_is_named_and_a_frozen_one_is_not() -> None:
    for smallest, found in ((1e-9, ["vanishing_gradients"]), (0.0, []), (1e-3, [])):
        job = Job(ranks=1, layers=3)
        job.tell(0, [1.0] * 60, layer_norms=[smallest, 0.1, 1.0] * 60)
        job.settle(1.0)
        assert job.causes() == found
    assert job.run.incidents.newest is None


def test_a_norm_that_fades_is_trouble_only_while_the_loss_has_not_come_down() -> None:
    for loss, found in (([2.0] * 100, ["vanishing_gradients"]), ([2.0 * 0.9**i for i in range(100)], [])):
        job = Job(ranks=1)
        job.train(50)
        job.tell(0, [1e-6] * 100, loss=loss)
        job.settle(1.0)
        assert job.causes() == found


def test_a_loss_that_goes_on_climbing_at_a_calm_norm_diverges_and_one_that_has_found_a_new_level_does_not() -> None:
    def climbing(level: float, growth: float) -> list[str]:
        job = Job(ranks=1)
        job.train(200, loss=[1.0] * 200)
        job.train(200, loss=[level + growth * i for i in range(200)])
        return job.causes()

    assert climbing(1.0, 0.05) == ["loss_divergence"]
    assert climbing(3.0, 0.0) == []
    assert climbing(3.0, -0.005) == []


def test_a_rank_that_was_killed_is_named_first_of_those_that_followed_it() -> None:
    job = Job(ranks=4)
    job.train(30)
    for rank, after in ((0, 0.6), (1, 0.7), (2, 0.0), (3, 0.8)):
        job.event(rank, pb.Event.RANK_LOST, after)
        job.leave(rank, pb.Goodbye.LOST)
    job.settle(1.0)
    assert job.causes() == []
    job.settle(5.0)
    (incident,) = job.run.incidents.kept
    verdict = incident["verdict"]
    assert (verdict["cause"], verdict["rank"], verdict["first_bad_step"]) == ("rank_lost", 2, 29)
    job.settle(5.0)
    assert job.causes() == ["rank_lost"]


def test_a_rank_whose_peer_died_in_a_collective_does_not_explain_the_death() -> None:
    job = Job(ranks=2)
    job.train(30)
    job.leave(0, pb.Goodbye.EXCEPTION, "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    job.event(1, pb.Event.RANK_LOST)
    job.settle(10.0)
    (incident,) = job.run.incidents.kept
    assert (incident["verdict"]["cause"], incident["verdict"]["rank"]) == ("rank_lost", 1)


def test_ranks_that_die_of_anothers_error_or_of_a_nan_are_not_lost() -> None:
    error = Job(ranks=2)
    error.train(30)
    error.leave(0, pb.Goodbye.EXCEPTION, "ValueError: no such file")
    error.event(1, pb.Event.RANK_LOST)
    error.settle(10.0)
    assert error.causes() == []
    failed = Job(ranks=2)
    failed.train(30)
    for rank in (0, 1):
        failed.tell(rank, [NAN], loss=[NAN])
    failed.settle(1.0)
    failed.event(1, pb.Event.RANK_LOST)
    failed.settle(10.0)
    assert failed.causes() == ["sudden_nonfinite"]


def test_a_run_whose_ranks_live_and_make_no_step_has_stalled_until_it_makes_one() -> None:
    job = Job(ranks=2)
    job.train(30)
    job.tell(0, [1.0])
    job.settle(1.0)
    for _ in range(30):
        job.now += 30.0
        job.hear()
        job.settle()
    (incident,) = job.run.incidents.kept
    verdict = incident["verdict"]
    assert (verdict["cause"], verdict["rank"]) == ("stalled", 1)
    job.tell(1, [1.0])
    job.train(1)
    assert job.causes(only_open=True) == []


def test_a_run_nobody_hears_of_is_silent_and_not_stalled() -> None:
    job = Job(ranks=2)
    job.train(30)
    job.settle(5000.0)
    assert job.causes() == []


def test_open_troubles_and_what_led_to_them_survive_a_restart() -> None:
    job = Job(ranks=2, layers=2)
    store = Store(":memory:")
    for rank in (0, 1):
        job.tell(rank, [1.0] * 60, local_norm=[1.0 + rank] * 60, layer_norms=[0.5, 0.5] * 60)
        job.tell(rank, [NAN], loss=[NAN], local_nan_parameters=[1.0])
    job.settle(1.0)
    store.commit(job.runs)
    window = store.incident_window("r", 1)
    assert window is not None
    assert len(window.records) == 2 * (DEFAULT.lead_steps + 1)
    assert window.layer_norms[0].tolist() == [0.5, 0.5]
    before = job.run
    job.runs = store.load(job.now, lambda _: FAST)
    after = job.run
    assert list(after.incidents.kept) == list(before.incidents.kept)
    assert after.newest.state() == before.newest.state()
    job.train(DEFAULT.recovered_after)
    assert job.causes(only_open=True) == []
    store.commit(job.runs)
    assert store.incident_window("r", 1) is not None
    store.close()


def test_a_step_that_skip_left_out_is_no_failure_and_the_first_that_it_did_not_is_one() -> None:
    job = Job(ranks=1)
    job.train(60)
    out, made = RANK_COLUMNS | pb.SKIPPED, RANK_COLUMNS
    job.tell(0, [NAN, NAN, NAN], flags=[out] * 3)
    job.train(20)
    assert job.causes() == []
    totals = job.run.totals
    assert (totals.counters["skipped"], totals.nonfinite["gradient nan"]) == (3, 3)
    job.tell(0, [NAN] * 5, flags=[out, out, out, made, made])
    job.settle(1.0)
    (incident,) = job.run.incidents.kept
    assert incident["verdict"]["first_bad_step"] == 86


def test_a_scaler_that_leaves_out_a_bad_loss_does_not_hide_it() -> None:
    job = Job(ranks=1)
    job.train(60)
    job.tell(0, [NAN], flags=[RANK_COLUMNS | pb.SKIPPED], loss=[NAN], loss_scale=[1024.0])
    job.settle(1.0)
    assert len(job.causes()) == 1


def test_what_a_shadow_would_have_done_is_counted_apart() -> None:
    job = Job(ranks=1)
    flags = [RANK_COLUMNS | pb.SHADOW_CLIPPED, RANK_COLUMNS | pb.SHADOW_CLIPPED | pb.SHADOW_SKIPPED, RANK_COLUMNS]
    job.tell(0, [1.0] * 3, flags=flags)
    job.settle(1.0)
    found = job.run.totals.counters
    assert (found["shadow_clipped"], found["shadow_skipped"], found["clipped"], found["skipped"]) == (2, 1, 0, 0)
