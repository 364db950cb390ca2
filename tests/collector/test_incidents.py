"""What becomes an incident, when it is judged anew, and when it is over. Records come as a stream brings them."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from foreshock_collector.condition import condition
from foreshock_collector.fleet import Runs
from foreshock_collector.rules import DEFAULT, Rules
from foreshock_collector.runs import Run
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
        self.launches = 0
        for rank in range(ranks):
            self._greet(rank)

    def _greet(self, rank: int, **changes: Any) -> None:
        names = [f"layer{i}" for i in range(self.layers)]
        model = pb.ModelSummary(layers=names, parameters=names, parameter_sizes=[1] * self.layers)
        model.parameter_layers.extend(range(self.layers))
        told = hello(
            instance=self.name(rank),
            launch=f"l{self.launches}",
            topology=pb.Topology(world_size=len(self.sent), rank=rank),
            model=model,
            **({"started_seconds": self.now} | changes),
        )
        self.runs.greet(told.hello, self.now)

    def name(self, rank: int) -> str:
        """Of the instance that the rank is now."""
        return f"r-{self.launches}-{rank}"

    @property
    def run(self) -> Run:
        found = self.runs.get("r")
        assert found is not None
        return found

    def tell(self, rank: int, norms: list[float], *, layer_norms: list[float] | None = None, **columns: Any) -> None:
        """Steps of one rank."""
        count = len(norms)
        told: dict[str, Any] = {"flags": [RANK_COLUMNS] * count, "loss": [2.0] * count, "local_norm": norms}
        batch = steps(self.sent[rank] + 1, norms, instance=self.name(rank), **(told | columns)).steps
        if layer_norms is not None:
            batch.global_layer_norms.extend(layer_norms)
        self.sent[rank] += count
        home = self.runs.home(self.name(rank))
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

    def event(self, rank: int, kind: pb.Event.Kind, seconds: float = 0.0, detail: str = "") -> None:
        home = self.runs.home(self.name(rank))
        assert home is not None
        told = pb.Event(instance=self.name(rank), kind=kind, wall_seconds=self.now + seconds, detail=detail)
        self.run.happened(home[1], told, self.now)

    def leave(self, rank: int, reason: pb.Goodbye.Reason, detail: str = "") -> None:
        home = self.runs.home(self.name(rank))
        assert home is not None
        goodbye = pb.Goodbye(instance=self.name(rank), reason=reason, detail=detail, last_sequence=self.sent[rank])
        self.run.leave(home[1], goodbye, self.now)

    def start_again(self, **changes: Any) -> None:
        """Another attempt, a second later."""
        self.now += 1.0
        self.launches += 1
        for rank in range(len(self.sent)):
            self.sent[rank] = 0
            self._greet(rank, **changes)

    def computed(self, rank: int, passes: int) -> None:
        """It is alive, and has computed so many backward passes."""
        batch = pb.StepBatch(instance=self.name(rank), first_sequence=self.sent[rank] + 1, backward_passes=passes)
        home = self.runs.home(self.name(rank))
        assert home is not None
        assert list(self.run.take(home[1], batch, self.now)) == []

    def hear(self) -> None:
        for rank in range(len(self.sent)):
            home = self.runs.home(self.name(rank))
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


def test_a_rank_out_of_all_proportion_is_an_outlier_and_nothing_is_said_of_a_nan() -> None:
    job = Job(ranks=3)
    job.train(60)
    assert job.causes() == []
    for rank in range(3):
        job.tell(rank, [1.0] * 60, local_norm=[40.0 if rank == 1 else 1.0 + 0.1 * rank] * 60)
    job.settle(1.0)
    (incident,) = job.run.incidents.kept
    verdict = incident["verdict"]
    assert (verdict["cause"], verdict["rank"], verdict["first_bad_step"]) == ("outlier_rank", 1, 60)
    assert (verdict["runbook"], verdict["finite"]) == ("ForeshockTrainingFault", True)


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


def test_an_exception_is_named_with_its_rank_and_the_ranks_that_died_of_it_are_not() -> None:
    job = Job(ranks=3)
    job.train(30)
    job.leave(0, pb.Goodbye.EXCEPTION, "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    job.leave(2, pb.Goodbye.EXCEPTION, "RuntimeError: no such file")
    job.event(1, pb.Event.RANK_LOST)
    job.settle(2.0)
    assert job.causes() == []
    job.settle(2.0)
    (incident,) = job.run.incidents.kept
    verdict = incident["verdict"]
    assert (verdict["cause"], verdict["rank"], verdict["first_bad_step"]) == ("crashed", 2, 29)
    assert verdict["summary"] == "Rank 2 died after step 29: RuntimeError: no such file."
    assert verdict["evidence"] == [
        "rank 2 after step 29: RuntimeError: no such file",
        "rank 0 lost a peer: RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer",
        "rank 1 ended without a goodbye, the last 0.0 s after the first",
    ]


def test_an_exception_of_all_ranks_is_one_incident_that_says_of_how_many() -> None:
    job = Job(ranks=4)
    job.train(30)
    for rank in (2, 0, 1, 3):
        job.leave(rank, pb.Goodbye.EXCEPTION, f"OutOfMemoryError: CUDA out of memory. GPU {rank} has 79.1 GiB")
        job.now += 0.1
    job.settle(5.0)
    (incident,) = job.run.incidents.kept
    verdict = incident["verdict"]
    assert (verdict["cause"], verdict["rank"]) == ("crashed", 2)
    assert verdict["summary"].startswith("4 ranks died after step 29, rank 2 first: OutOfMemoryError: CUDA out of")
    assert "batch" in verdict["try"][0]


def test_a_signal_that_is_known_makes_a_crash_and_one_that_is_not_a_lost_rank() -> None:
    for detail, cause in (("killed by SIGKILL, memory pressure?", "crashed"), ("", "rank_lost")):
        job = Job(ranks=2)
        job.train(30)
        job.event(1, pb.Event.RANK_LOST)
        job.leave(1, pb.Goodbye.LOST, detail)
        job.leave(0, pb.Goodbye.INTERRUPTED, "SIGTERM")
        job.settle(5.0)
        (incident,) = job.run.incidents.kept
        assert (incident["verdict"]["cause"], incident["verdict"]["rank"]) == (cause, 1)
        assert detail in incident["verdict"]["summary"]
        assert condition(job.run, job.now, 900.0) == "failed"


@pytest.mark.parametrize(
    ("reason", "detail", "word"),
    [
        (pb.Goodbye.FINISHED, "", "ended"),
        (pb.Goodbye.DETACHED, "", "ended"),
        (pb.Goodbye.INTERRUPTED, "KeyboardInterrupt", "interrupted"),
    ],
)
def test_a_run_that_ends_well_or_at_its_users_word_is_no_incident(
    reason: pb.Goodbye.Reason, detail: str, word: str
) -> None:
    job = Job(ranks=2)
    job.train(30)
    job.leave(0, reason, detail)
    job.leave(1, reason, detail)
    job.settle(1.0)
    assert condition(job.run, job.now, 900.0) == word
    job.settle(10.0)
    assert (job.causes(), condition(job.run, job.now, 900.0)) == ([], word)


def test_a_process_that_ends_with_success_and_without_a_word_has_ended_well() -> None:
    job = Job(ranks=2)
    job.train(30)
    job.leave(0, pb.Goodbye.FINISHED)
    job.event(1, pb.Event.RANK_LOST)
    job.leave(1, pb.Goodbye.LOST, "exit code 0")
    job.settle(10.0)
    assert (job.causes(), condition(job.run, job.now, 900.0)) == ([], "ended")


def test_what_breaks_because_its_user_interrupts_it_or_kills_what_hangs_on_is_no_crash() -> None:
    job = Job(ranks=4)
    job.train(30)
    job.leave(0, pb.Goodbye.INTERRUPTED, "KeyboardInterrupt")
    job.leave(1, pb.Goodbye.EXCEPTION, "RuntimeError: DataLoader worker (pid 7) is killed by signal: Interrupt.")
    job.leave(2, pb.Goodbye.EXCEPTION, "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    job.settle(30.0)
    job.event(3, pb.Event.RANK_LOST)
    job.leave(3, pb.Goodbye.LOST, "killed by SIGKILL")
    job.settle(10.0)
    assert (job.causes(), condition(job.run, job.now, 900.0)) == ([], "interrupted")


def test_an_attempt_that_fails_already_is_told_how_it_ended_and_nothing_is_opened() -> None:
    for reason, detail in ((pb.Goodbye.EXCEPTION, "exit code 1"), (pb.Goodbye.LOST, "killed by SIGKILL")):
        job = Job(ranks=2)
        job.train(30)
        for rank in (0, 1):
            job.tell(rank, [NAN], loss=[NAN])
            job.leave(rank, reason, detail)
        for _ in range(10):
            job.settle(1.0)
        (incident,) = job.run.incidents.kept
        assert incident["verdict"]["cause"] == "sudden_nonfinite"
        assert incident["verdict"]["evidence"][-1] == f"ended by rank 0: {detail}"
        assert incident["closed_seconds"] is not None
        assert condition(job.run, job.now, 900.0) == "failed"


def test_what_is_told_late_of_a_death_changes_the_verdict_and_not_the_number_of_incidents() -> None:
    job = Job(ranks=2)
    job.train(30)
    job.leave(0, pb.Goodbye.EXCEPTION, "RuntimeError: Connection reset by peer")
    for _ in range(5):
        job.hear()
        job.settle(1.0)
    (incident,) = job.run.incidents.kept
    assert (incident["verdict"]["cause"], incident["verdict"]["confidence"]) == ("crashed", 0.5)
    job.leave(1, pb.Goodbye.EXCEPTION, "ValueError: no such file")
    job.settle(5.0)
    (incident,) = job.run.incidents.kept
    assert (incident["verdict"]["cause"], incident["verdict"]["rank"]) == ("crashed", 1)


def test_a_death_is_over_once_a_later_attempt_makes_steps() -> None:
    job = Job(ranks=1)
    job.train(30)
    job.leave(0, pb.Goodbye.EXCEPTION, "ValueError: no such file")
    job.settle(5.0)
    job.settle(100.0)
    assert job.causes(only_open=True) == ["crashed"]
    assert job.run.totals.incidents["crashed"] == 1
    job.start_again()
    job.settle(1.0)
    assert job.causes(only_open=True) == ["crashed"]
    job.train(1)
    assert job.causes(only_open=True) == []
    assert condition(job.run, job.now, 900.0) == "running"


def test_a_restart_on_a_machine_whose_clock_is_behind_is_the_newest_attempt_all_the_same() -> None:
    job = Job(ranks=1)
    job.train(30)
    job.leave(0, pb.Goodbye.EXCEPTION, "ValueError: no such file")
    job.settle(5.0)
    job.start_again(started_seconds=900.0)
    job.train(1)
    store = Store(":memory:")
    store.commit(job.runs)
    job.runs = store.load(job.now)
    assert (job.run.newest.number, job.causes(only_open=True)) == (1, [])
    assert condition(job.run, job.now, 900.0) == "running"
    store.close()


def test_a_restart_that_makes_steps_before_the_death_is_judged_leaves_it_closed() -> None:
    job = Job(ranks=1)
    job.train(30)
    job.leave(0, pb.Goodbye.EXCEPTION, "ValueError: no such file")
    job.start_again()
    job.train(1)
    job.leave(0, pb.Goodbye.FINISHED)
    job.settle(5.0)
    assert (job.causes(), job.causes(only_open=True)) == (["crashed"], [])


def test_a_death_that_is_handed_in_after_the_next_start_needs_nobody() -> None:
    job = Job(ranks=2)
    job.settle(1.0)
    # What the collector was away for, from a recorder that found it at the new job's start.
    job.start_again(gone=True, started_seconds=500.0)
    for rank in (0, 1):
        job.tell(rank, [1.0] * 5)
        job.leave(rank, pb.Goodbye.LOST, "killed by SIGKILL")
    for _ in range(5):
        job.hear()
        job.settle(1.0)
        assert job.causes(only_open=True) == []
    (incident,) = job.run.incidents.kept
    assert (incident["verdict"]["cause"], incident["attempt"]) == ("crashed", 1)
    assert condition(job.run, job.now, 900.0) == "running"


@pytest.mark.parametrize(("shift", "causes"), [(0, ["replica_drift"]), (1, [])])
def test_weights_are_compared_between_ranks_only_at_the_same_step(shift: int, causes: list[str]) -> None:
    """A rank that observes once more than the others, for its validation, is a record behind from then on."""
    job = Job(ranks=2)
    for rank in (0, 1):
        numbers = [number - shift * rank for number in range(31)]
        prints = [100.0 + number for number in numbers]
        if not shift:
            prints[-1] += rank
        job.tell(rank, [1.0] * 31, local_norm=[1.5 + rank] * 31, step=numbers, parameter_fingerprint=prints)
    job.settle(1.0)
    assert job.causes() == causes


def test_a_failure_of_the_attempt_before_that_is_told_late_alerts_nobody() -> None:
    job = Job(ranks=1)
    job.train(40)
    before, sent = job.name(0), job.sent[0]
    # Its node is cut off, and the job goes on elsewhere.
    job.now += 20.0
    job.start_again()
    job.train(5)
    home = job.runs.home(before)
    assert home is not None
    late = steps(sent + 1, [30.0, 300.0, NAN], instance=before, flags=[RANK_COLUMNS] * 3, loss=[2.0, 2.0, NAN])
    for _ in job.run.take(home[1], late.steps, job.now):
        pytest.fail("so few steps need no room")
    job.settle(5.0)
    (incident,) = job.run.incidents.kept
    cause = incident["verdict"]["cause"]
    assert (cause, incident["attempt"]) == ("exploding_gradients", 0)
    totals = job.run.totals
    assert (totals.incidents[cause], totals.last_incident[cause]) == (1, 0.0)
    assert totals.counters["build_up"] == 1 and totals.last["build_up"] == 0.0
    assert condition(job.run, job.now, 900.0) == "running"


def test_a_run_that_nobody_hears_of_any_more_is_lost_until_it_is_heard_of_again() -> None:
    job = Job(ranks=2)
    job.train(30)
    job.now += 898.0
    job.run.fall_silent(job.now, 900.0)
    assert (job.causes(), condition(job.run, job.now, 900.0)) == ([], "running")
    job.now += 2.0
    for _ in range(2):
        job.run.fall_silent(job.now, 900.0)
    (incident,) = job.run.incidents.kept
    assert incident["verdict"]["cause"] == "rank_lost"
    assert incident["verdict"]["summary"] == (
        "2 of 2 ranks fell silent after step 29, without a goodbye: nothing has been heard of them for 900 s."
    )
    assert condition(job.run, job.now, 900.0) == "failed"
    job.hear()
    assert (job.causes(only_open=True), condition(job.run, job.now, 900.0)) == ([], "running")


@pytest.mark.parametrize(("detail", "causes"), [("killed by SIGKILL", ["crashed"]), ("exit code 0", [])])
def test_a_death_is_judged_by_what_the_recorder_said_at_once_where_the_goodbye_takes_its_time(
    detail: str, causes: list[str]
) -> None:
    job = Job(ranks=1)
    job.train(30)
    job.event(0, pb.Event.RANK_LOST, detail=detail)
    for _ in range(5):
        job.settle(1.0)
    job.leave(0, pb.Goodbye.LOST, detail)
    job.settle(1.0)
    assert job.causes() == causes


@pytest.mark.parametrize("left", [False, True])
def test_a_collector_that_starts_does_not_take_a_run_that_fell_silent_for_one_that_is_there(left: bool) -> None:
    job = Job(ranks=2)
    job.train(30)
    if left:
        job.leave(0, pb.Goodbye.FINISHED)
    job.settle(901.0)
    job.run.fall_silent(job.now, 900.0)
    word = condition(job.run, job.now, 900.0)
    store = Store(":memory:")
    store.commit(job.runs)
    job.now += 10_000.0
    job.runs = store.load(job.now)
    assert not job.run.active(job.now, 900.0)
    assert (condition(job.run, job.now, 900.0), word) == (word, "ended" if left else "failed")
    assert job.run.ended_for(job.now, 900.0) > 9_000.0
    job.hear()
    assert job.run.active(job.now, 900.0)
    store.close()


def test_a_rank_whose_last_word_is_lost_has_ended_with_the_others() -> None:
    job = Job(ranks=2)
    job.train(30)
    job.leave(0, pb.Goodbye.FINISHED)
    job.settle(901.0)
    job.run.fall_silent(job.now, 900.0)
    assert (job.causes(), condition(job.run, job.now, 900.0)) == ([], "ended")


def test_the_rank_of_a_machine_that_vanished_is_named_by_the_peers_that_lost_it() -> None:
    job = Job(ranks=2)
    job.train(30)
    job.now += 5.0
    job.leave(0, pb.Goodbye.EXCEPTION, "RuntimeError: Connection reset by peer")
    job.settle(5.0)
    (incident,) = job.run.incidents.kept
    assert (incident["verdict"]["cause"], incident["verdict"]["rank"]) == ("rank_lost", 1)
    assert "rank 0 lost it" in incident["verdict"]["evidence"][1]


@pytest.mark.parametrize(
    ("passes", "rank", "says"),
    [
        ((32, 31, 32), 1, "rank 1 has not arrived"),
        ((31, 31, 32), None, "ranks 0, 1 have not arrived"),
        ((32, 32, 32), 1, "rank 1 has not finished step 30"),
        ((0, 0, 0), 1, "rank 1 has not finished step 30"),
    ],
)
def test_a_run_whose_ranks_live_and_make_no_step_has_stalled_until_it_makes_one(
    passes: tuple[int, ...], rank: int | None, says: str
) -> None:
    job = Job(ranks=3)
    job.train(30)
    for each in (0, 2):
        job.tell(each, [1.0])
    for each, count in enumerate(passes):
        job.computed(each, count)
    job.settle(6.0)
    for _ in range(4):
        job.now += 30.0
        job.hear()
        job.settle()
    assert (job.causes(), condition(job.run, job.now, 900.0)) == ([], "running")
    job.now += 30.0
    job.hear()
    job.settle()
    (incident,) = job.run.incidents.kept
    verdict = incident["verdict"]
    assert (verdict["cause"], verdict["rank"], verdict["first_bad_step"]) == ("stalled", rank, 30)
    assert says in verdict["summary"]
    assert condition(job.run, job.now, 900.0) == "stalled"
    job.tell(1, [1.0])
    job.train(1)
    assert job.causes(only_open=True) == []


@pytest.mark.parametrize("left", [False, True])
def test_a_stall_never_says_that_all_have_arrived_where_a_rank_is_not_there(left: bool) -> None:
    job = Job(ranks=3)
    job.train(30)
    if left:
        job.leave(2, pb.Goodbye.FINISHED)
    for _ in range(7):
        job.now += 20.0
        for rank in (0, 1):
            job.computed(rank, 31)
        job.settle()
    (incident,) = job.run.incidents.kept
    verdict = incident["verdict"]
    assert (verdict["cause"], verdict["rank"]) == ("stalled", 2)
    assert "though other ranks are alive: rank 2 is not there." in verdict["summary"]
    assert verdict["evidence"][1:] == ["its other ranks still report", "left, or not heard of: rank 2"]


def test_a_stall_goes_on_while_the_collector_starts_again() -> None:
    job = Job(ranks=2)
    job.train(30)
    for _ in range(3):
        job.now += 60.0
        job.hear()
        job.settle()
    store = Store(":memory:")
    store.commit(job.runs)
    job.now += 90.0
    job.runs = store.load(job.now, lambda _: FAST)
    job.settle()
    assert job.causes(only_open=True) == ["stalled"]
    job.now += 50.0
    job.hear()
    job.settle(50.0)
    assert job.causes(only_open=True) == ["stalled"]
    job.train(1)
    assert (job.causes(), job.causes(only_open=True)) == (["stalled"], [])
    store.close()


def test_what_was_open_in_an_attempt_whose_machine_vanished_is_over_once_another_goes_on() -> None:
    job = Job(ranks=2)
    job.train(60, alike=True)
    for _ in range(3):
        job.now += 60.0
        job.hear()
        job.settle()
    assert job.causes(only_open=True) == ["duplicate_data", "stalled"]
    job.now += 120.0
    job.start_again()
    job.train(1)
    assert job.causes(only_open=True) == []
    assert (job.run.resting, condition(job.run, job.now, 900.0)) == (False, "running")


def test_the_first_steps_of_an_attempt_have_ten_minutes_each_be_there_one_or_none() -> None:
    for made in (0, 1, 9):
        job = Job(ranks=2)
        if made:
            job.train(made)
        for _ in range(20):
            job.now += 30.0
            job.hear()
            job.settle()
        assert job.causes() == []
        job.now += 30.0
        job.hear()
        job.settle()
        assert job.causes() == ["stalled"]


@pytest.mark.parametrize(("duration", "limit"), [(0.1, 120.0), (30.0, 600.0), (600.0, 1800.0)])
def test_a_stall_is_twenty_usual_steps_and_never_under_two_minutes_or_over_thirty(
    duration: float, limit: float
) -> None:
    job = Job(ranks=1)
    job.tell(0, [1.0] * 20, monotonic_seconds=[duration * i for i in range(1, 21)])
    job.settle(1.0)
    assert job.run.stall_after() == pytest.approx(limit)


def test_of_a_stall_in_which_all_have_come_equally_far_nobody_is_named() -> None:
    job = Job(ranks=3)
    job.train(30)
    for rank in range(3):
        job.computed(rank, 31)
    job.now += 130.0
    job.hear()
    job.settle()
    (incident,) = job.run.incidents.kept
    assert (incident["verdict"]["cause"], incident["verdict"]["rank"]) == ("stalled", None)
    assert "all ranks have computed their gradients" in incident["verdict"]["summary"]


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
