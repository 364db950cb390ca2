"""How ranks leave, who is said to have died of what, and what is said of a run that nobody hears of."""

from __future__ import annotations

import pytest

from foreshock_collector.state.condition import condition
from foreshock_collector.state.store import Store
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.job_in_memory import NAN, Job


def test_a_rank_that_was_killed_is_named_first_of_those_that_followed_it() -> None:
    job = Job(ranks=4)
    job.train(30)
    for rank, after in ((0, 0.6), (1, 0.7), (2, 0.0), (3, 0.8)):
        job.event(rank, pb.Event.RANK_LOST, after)
        job.leave(rank, pb.ExitReason.LOST)
    job.settle(1.0)
    assert job.causes() == []
    job.settle(5.0)
    (incident,) = job.run.incidents.kept
    verdict = incident.verdict
    assert (verdict.cause, verdict.rank, verdict.first_bad_step) == ("rank_lost", 2, 29)
    job.settle(5.0)
    assert job.causes() == ["rank_lost"]


def test_a_rank_whose_peer_died_in_a_collective_does_not_explain_the_death() -> None:
    job = Job(ranks=2)
    job.train(30)
    job.leave(0, pb.ExitReason.EXCEPTION, "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    job.event(1, pb.Event.RANK_LOST)
    job.settle(10.0)
    (incident,) = job.run.incidents.kept
    assert (incident.verdict.cause, incident.verdict.rank) == ("rank_lost", 1)


def test_a_collective_that_ran_out_of_memory_may_be_the_peers_fault_and_gets_advice_on_memory() -> None:
    job = Job(ranks=2)
    job.train(30)
    detail = "DistBackendError: NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"
    for rank in range(2):
        job.leave(rank, pb.ExitReason.EXCEPTION, detail)
    job.settle(10.0)
    (incident,) = job.run.incidents.kept
    verdict = incident.verdict
    assert (verdict.cause, verdict.confidence, len(verdict.alternatives)) == ("crashed", 0.5, 1)
    assert "batch" in verdict.try_[0]


def test_an_exception_is_named_with_its_rank_and_the_ranks_that_died_of_it_are_not() -> None:
    job = Job(ranks=3)
    job.train(30)
    job.leave(0, pb.ExitReason.EXCEPTION, "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    job.leave(2, pb.ExitReason.EXCEPTION, "RuntimeError: no such file")
    job.event(1, pb.Event.RANK_LOST)
    job.settle(2.0)
    assert job.causes() == []
    job.settle(2.0)
    (incident,) = job.run.incidents.kept
    verdict = incident.verdict
    assert (verdict.cause, verdict.rank, verdict.first_bad_step) == ("crashed", 2, 29)
    assert verdict.summary == "Rank 2 died after step 29: RuntimeError: no such file."
    assert list(verdict.evidence) == [
        "rank 2 after step 29: RuntimeError: no such file",
        "rank 0 lost a peer: RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer",
        "rank 1 ended without reporting why, the last 0.0 s after the first",
    ]


def test_an_exception_of_all_ranks_is_one_incident_that_says_of_how_many() -> None:
    job = Job(ranks=4)
    job.train(30)
    for rank in (2, 0, 1, 3):
        job.leave(rank, pb.ExitReason.EXCEPTION, f"OutOfMemoryError: CUDA out of memory. GPU {rank} has 79.1 GiB")
        job.now += 0.1
    job.settle(5.0)
    (incident,) = job.run.incidents.kept
    verdict = incident.verdict
    assert (verdict.cause, verdict.rank) == ("crashed", 2)
    assert verdict.summary.startswith("4 ranks died after step 29, rank 2 first: OutOfMemoryError: CUDA out of")
    assert "batch" in verdict.try_[0]


def test_a_signal_that_is_known_makes_a_crash_and_one_that_is_not_a_lost_rank() -> None:
    for detail, cause in (("killed by SIGKILL, memory pressure?", "crashed"), ("", "rank_lost")):
        job = Job(ranks=2)
        job.train(30)
        job.event(1, pb.Event.RANK_LOST)
        job.leave(1, pb.ExitReason.LOST, detail)
        job.leave(0, pb.ExitReason.INTERRUPTED, "SIGTERM")
        job.settle(5.0)
        (incident,) = job.run.incidents.kept
        assert (incident.verdict.cause, incident.verdict.rank) == (cause, 1)
        assert detail in incident.verdict.summary
        assert condition(job.run, job.now, 900.0) == "failed"


@pytest.mark.parametrize(
    ("reason", "detail", "word"),
    [
        (pb.ExitReason.FINISHED, "", "ended"),
        (pb.ExitReason.DETACHED, "", "ended"),
        (pb.ExitReason.INTERRUPTED, "KeyboardInterrupt", "interrupted"),
    ],
)
def test_a_run_that_ends_well_or_at_its_users_word_is_no_incident(
    reason: pb.ExitReason, detail: str, word: str
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
    job.leave(0, pb.ExitReason.FINISHED)
    job.event(1, pb.Event.RANK_LOST)
    job.leave(1, pb.ExitReason.LOST, "exit code 0")
    job.settle(10.0)
    assert (job.causes(), condition(job.run, job.now, 900.0)) == ([], "ended")


def test_what_breaks_because_its_user_interrupts_it_or_kills_what_hangs_on_is_no_crash() -> None:
    job = Job(ranks=4)
    job.train(30)
    job.leave(0, pb.ExitReason.INTERRUPTED, "KeyboardInterrupt")
    job.leave(1, pb.ExitReason.EXCEPTION, "RuntimeError: DataLoader worker (pid 7) is killed by signal: Interrupt.")
    job.leave(2, pb.ExitReason.EXCEPTION, "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    job.settle(30.0)
    job.event(3, pb.Event.RANK_LOST)
    job.leave(3, pb.ExitReason.LOST, "killed by SIGKILL")
    job.settle(10.0)
    assert (job.causes(), condition(job.run, job.now, 900.0)) == ([], "interrupted")


def test_an_attempt_that_fails_already_is_told_how_it_ended_and_nothing_is_opened() -> None:
    for reason, detail in ((pb.ExitReason.EXCEPTION, "exit code 1"), (pb.ExitReason.LOST, "killed by SIGKILL")):
        job = Job(ranks=2)
        job.train(30)
        for rank in (0, 1):
            job.tell(rank, [NAN], loss=[NAN])
            job.leave(rank, reason, detail)
        for _ in range(10):
            job.settle(1.0)
        (incident,) = job.run.incidents.kept
        assert incident.verdict.cause == "sudden_nonfinite"
        assert incident.verdict.evidence[-1] == f"ended by rank 0: {detail}"
        assert incident.closed_seconds is not None
        assert condition(job.run, job.now, 900.0) == "failed"


def test_what_is_told_late_of_a_death_changes_the_verdict_and_not_the_number_of_incidents() -> None:
    job = Job(ranks=2)
    job.train(30)
    job.leave(0, pb.ExitReason.EXCEPTION, "RuntimeError: Connection reset by peer")
    for _ in range(5):
        job.heartbeat()
        job.settle(1.0)
    (incident,) = job.run.incidents.kept
    assert (incident.verdict.cause, incident.verdict.confidence) == ("crashed", 0.5)
    job.leave(1, pb.ExitReason.EXCEPTION, "ValueError: no such file")
    job.settle(5.0)
    (incident,) = job.run.incidents.kept
    assert (incident.verdict.cause, incident.verdict.rank) == ("crashed", 1)


def test_a_death_is_over_once_a_later_attempt_makes_steps() -> None:
    job = Job(ranks=1)
    job.train(30)
    job.leave(0, pb.ExitReason.EXCEPTION, "ValueError: no such file")
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
    job.leave(0, pb.ExitReason.EXCEPTION, "ValueError: no such file")
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
    job.leave(0, pb.ExitReason.EXCEPTION, "ValueError: no such file")
    job.start_again()
    job.train(1)
    job.leave(0, pb.ExitReason.FINISHED)
    job.settle(5.0)
    assert (job.causes(), job.causes(only_open=True)) == (["crashed"], [])


def test_a_death_that_is_handed_in_after_the_next_start_needs_nobody() -> None:
    job = Job(ranks=2)
    job.settle(1.0)
    # What the collector was away for, from a recorder that found it at the new job's start.
    job.start_again(exited=True, started_seconds=500.0)
    for rank in (0, 1):
        job.tell(rank, [1.0] * 5)
        job.leave(rank, pb.ExitReason.LOST, "killed by SIGKILL")
    for _ in range(5):
        job.heartbeat()
        job.settle(1.0)
        assert job.causes(only_open=True) == []
    (incident,) = job.run.incidents.kept
    assert (incident.verdict.cause, incident.attempt) == ("crashed", 1)
    assert condition(job.run, job.now, 900.0) == "running"


def test_a_run_that_nobody_hears_of_any_more_is_lost_until_it_is_heard_of_again() -> None:
    job = Job(ranks=2)
    job.train(30)
    job.now += 898.0
    job.run.check_silence(job.now, 900.0)
    assert (job.causes(), condition(job.run, job.now, 900.0)) == ([], "running")
    job.now += 2.0
    for _ in range(2):
        job.run.check_silence(job.now, 900.0)
    (incident,) = job.run.incidents.kept
    assert incident.verdict.cause == "rank_lost"
    assert incident.verdict.summary == (
        "2 of 2 ranks fell silent after step 29: nothing has been received from them for 900 s."
    )
    assert condition(job.run, job.now, 900.0) == "failed"
    job.heartbeat()
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
    job.leave(0, pb.ExitReason.LOST, detail)
    job.settle(1.0)
    assert job.causes() == causes


@pytest.mark.parametrize("left", [False, True])
def test_a_collector_that_starts_does_not_take_a_run_that_fell_silent_for_one_that_is_there(left: bool) -> None:
    job = Job(ranks=2)
    job.train(30)
    if left:
        job.leave(0, pb.ExitReason.FINISHED)
    job.settle(901.0)
    job.run.check_silence(job.now, 900.0)
    word = condition(job.run, job.now, 900.0)
    store = Store(":memory:")
    store.commit(job.runs)
    job.now += 10_000.0
    job.runs = store.load(job.now)
    assert not job.run.active(job.now, 900.0)
    assert (condition(job.run, job.now, 900.0), word) == (word, "ended" if left else "failed")
    assert job.run.ended_for(job.now, 900.0) > 9_000.0
    job.heartbeat()
    assert job.run.active(job.now, 900.0)
    store.close()


def test_a_rank_whose_last_word_is_lost_has_ended_with_the_others() -> None:
    job = Job(ranks=2)
    job.train(30)
    job.leave(0, pb.ExitReason.FINISHED)
    job.settle(901.0)
    job.run.check_silence(job.now, 900.0)
    assert (job.causes(), condition(job.run, job.now, 900.0)) == ([], "ended")


def test_the_rank_of_a_machine_that_vanished_is_named_by_the_peers_that_lost_it() -> None:
    job = Job(ranks=2)
    job.train(30)
    job.now += 5.0
    job.leave(0, pb.ExitReason.EXCEPTION, "RuntimeError: Connection reset by peer")
    job.settle(5.0)
    (incident,) = job.run.incidents.kept
    assert (incident.verdict.cause, incident.verdict.rank) == ("rank_lost", 1)
    assert "rank 0 lost it" in incident.verdict.evidence[1]
