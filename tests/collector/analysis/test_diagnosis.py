"""Which cause is named, from which evidence. The steps go through the detector, as live ones do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from foreshock_collector.analysis.detection import Detector, Event
from foreshock_collector.analysis.explosion import multiples_of_others
from foreshock_collector.analysis.rules import DEFAULT
from foreshock_collector.analysis.verdicts import Verdict
from foreshock_collector.records.batch import decode
from foreshock_collector.records.buffer import RecordBuffer
from foreshock_collector.records.steps import ModelFacts
from foreshock_protos.v1 import telemetry_pb2 as pb
from tests.support.diagnosed_steps import PLAIN, climb, quiet, verdict
from tests.support.streams import steps

RECURRENT = ModelFacts(type="CharRNN", module_types={"RNN": 1, "Linear": 1}, layers=("rnn", "head"))
DEEP = ModelFacts(type="MLP", module_types={"Linear": 12, "ReLU": 11}, layers=tuple(f"l{i}" for i in range(12)))


def ranks(sequence: int, **bad: Any) -> RecordBuffer:
    """A buffer on which, at this step, rank 1 of 2 says `bad` and rank 0 nothing."""
    buffer = RecordBuffer(world_size=2, layers=0, finalized=sequence - 1)
    for rank, told in enumerate(({}, bad)):
        columns: dict[str, Any] = {"flags": [pb.LOSS_OBSERVED], "loss": [2.0]} | {
            name: [value] for name, value in told.items()
        }
        buffer.write(rank, decode(steps(sequence, [1.0], **columns).steps, 0), now=0.0)
    return buffer


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("records", "cause"),
    [
        (quiet(), "healthy"),
        ([*quiet(), *climb(), {"norm": NAN, "loss": NAN}], "exploding_gradients"),
        ([{"norm": NAN, "loss": NAN}], "first_step_nonfinite"),
        ([*quiet(), {"norm": NAN, "loss": NAN}], "sudden_nonfinite"),
        ([*quiet(), {"norm": NAN, "loss": None}], "sudden_nonfinite"),
        ([*quiet(), {"norm": INF, "loss": 2.0}], "nonfinite_gradient"),
        (
            [*quiet(scale=1024.0), *[{"norm": INF, "loss": 2.0, "scale": 2.0}] * DEFAULT.collapse_after],
            "amp_scale_collapse",
        ),
    ],
)
def test_the_cause_follows_from_what_came_before(records: list[dict[str, Any]], cause: str) -> None:
    found = verdict(records)
    assert found.cause == cause
    assert (found.first_bad_step == len(records) - 1) == (cause != "healthy")
    assert bool(found.try_) == (cause != "healthy")
    assert (found.likely_root is None) == (cause != "exploding_gradients")


def test_one_rank_whose_gradient_alone_is_bad_is_a_bad_rank() -> None:
    records = [*quiet(), {"norm": NAN, "loss": 2.0}]
    found = verdict(records, buffer=ranks(101, local_nan_parameters=1.0))
    assert (found.cause, found.rank) == ("bad_rank", 1)
    assert "rank 1" in found.try_[0]


def test_one_rank_whose_loss_is_bad_has_a_bad_batch() -> None:
    records = [*quiet(), {"norm": NAN, "loss": NAN}]
    found = verdict(records, buffer=ranks(101, local_nan_parameters=1.0, loss=NAN))
    assert (found.cause, found.rank) == ("sudden_nonfinite", 1)


def test_sparse_records_cannot_tell() -> None:
    records = [*quiet(), {"norm": NAN, "loss": NAN}]
    assert verdict(records, apart=49).cause == "sudden_nonfinite"
    found = verdict(records, apart=50)
    assert (found.cause, found.confidence) == ("unknown", 0.3)


@pytest.mark.parametrize(
    ("calm", "most"),
    # From 2^32 a scaler comes down to 1 within 32 steps. Later it has no reason to fall far.
    [(0, DEFAULT.search_steps), (1, DEFAULT.collapse_after)],
)
def test_a_scaler_that_looks_for_its_scale_is_no_failure(calm: int, most: int) -> None:
    detector = Detector()

    def step(sequence: int, *, overflow: bool) -> list[Event]:
        where: dict[str, Any] = {"attempt": 0, "sequence": sequence, "step": sequence - 1}
        norm = INF if overflow else 1.0
        return detector.update(norm=norm, loss=2.0, nonfinite=int(overflow), skipped=overflow, **where)

    assert not any(step(sequence, overflow=False) for sequence in range(1, calm + 1))
    assert not any(step(sequence, overflow=True) for sequence in range(calm + 1, calm + most))
    (event,) = step(calm + most, overflow=True)
    assert event.kind == "nonfinite"


def test_overflows_do_not_hide_a_nan_that_follows() -> None:
    records = [*quiet(scale=1024.0), {"norm": INF, "loss": 2.0, "scale": 512.0}, {"norm": NAN, "loss": NAN}]
    assert verdict(records).cause == "sudden_nonfinite"


@pytest.mark.parametrize(
    ("model", "calm", "rates", "root", "first"),
    [
        (RECURRENT, quiet(), [0.1] * 60 + [0.1 + 0.01 * i for i in range(40)], "learning_rate", "learning rate"),
        (PLAIN, [{"norm": 900.0, "loss": 2.0}, *quiet(30)], [0.1] * 31, "initialization", "initialization"),
        (PLAIN, quiet(30), [0.1] * 30, "learning_rate", "learning rate"),
        (DEEP, quiet(30), [0.1] * 30, "normalization", "LayerNorm"),
        (RECURRENT, quiet(), [0.1] * 100, "recurrent", "LSTM"),
        (DEEP, quiet(), [0.1] * 100, "normalization", "LayerNorm"),
        (PLAIN, quiet(), [0.1] * 100, "unknown", "clip by norm"),
    ],
)
def test_the_first_thing_to_try_follows_from_the_likely_root(
    model: ModelFacts, calm: list[dict[str, Any]], rates: list[float], root: str, first: str
) -> None:
    calm = [record | {"rate": rate} for record, rate in zip(calm, rates, strict=True)]
    blown = [record | {"rate": rates[-1]} for record in climb()]
    found = verdict([*calm, *blown, {"norm": NAN, "loss": NAN, "rate": rates[-1]}], model=model)
    assert (found.cause, found.likely_root) == ("exploding_gradients", root)
    assert first in found.try_[0]


def test_a_run_too_young_for_a_history_has_exploded_if_its_last_norm_says_so() -> None:
    young = [{"norm": norm, "loss": 2.0} for norm in (8.0, 79.0, 1e6)]
    found = verdict([*young, {"norm": NAN, "loss": NAN}], model=DEEP)
    assert (found.cause, found.onset_step, found.lead_steps) == ("exploding_gradients", 2, 1)
    calm = [{"norm": norm, "loss": 2.0} for norm in (8.0, 7.0, 9.0)]
    assert verdict([*calm, {"norm": NAN, "loss": NAN}], model=DEEP).cause == "sudden_nonfinite"


def test_a_spike_of_one_rank_alone_before_the_nan_is_that_ranks_fault() -> None:
    def after_spike(local: tuple[float, float]) -> Verdict:
        buffer = RecordBuffer(world_size=2, layers=0, finalized=100)
        for rank, norm in enumerate(local):
            columns: dict[str, Any] = {"flags": [pb.LOCAL_NORMS | pb.LOSS_OBSERVED] * 2, "local_norm": [norm, NAN]}
            batch = steps(101, [1e30, NAN], loss=[2.0, NAN], local_nan_parameters=[0.0, 3.0], **columns).steps
            buffer.write(rank, decode(batch, 0), now=0.0)
        return verdict([*quiet(), {"norm": 1e30, "loss": 2.0}, {"norm": NAN, "loss": NAN}], buffer=buffer)

    found = after_spike((1.0, 2e30))
    assert (found.cause, found.rank, found.first_bad_step) == ("bad_rank", 1, 101)
    assert after_spike((1e30, 2e30)).cause == "exploding_gradients"


def climbing(
    world: int, *, seed: int, loud: int | None = None, noise: float, calm: int = 50, lead: int = 4, times: float = 8.0
) -> Verdict:
    """A run whose ranks all explode, and differ by chance; one of them `times` as loud as the others, if any."""
    random = np.random.default_rng(seed)
    norms = [*([1.0] * calm), *(8.0 ** np.arange(1, lead + 1))]
    records = [{"norm": norm, "loss": 2.0} for norm in norms]
    buffer = RecordBuffer(world_size=world, layers=0, finalized=0)
    for rank in range(world):
        # The noise of ranks grows as the weights leave what they have learned.
        chance = np.exp(random.standard_normal(len(norms)) * np.where(np.array(norms) > 1, noise, noise / 4))
        local = np.array(norms) * chance
        if rank == loud:
            local[calm:] *= times
        batch = steps(1, norms, flags=[pb.LOCAL_NORMS] * len(norms), local_norm=local.tolist()).steps
        buffer.write(rank, decode(batch, 0), now=0.0)
    return verdict([*records, {"norm": NAN, "loss": NAN}], buffer=buffer)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_no_rank_is_named_where_all_exploded_alike(world: int) -> None:
    found = [climbing(world, seed=seed, noise=noise) for seed in range(60) for noise in (0.05, 0.4)]
    assert {each.cause for each in found} == {"exploding_gradients"}
    assert [each.rank for each in found] == [None] * len(found)
    assert all("local norm of rank" not in line for each in found for line in each.evidence)
    # With so little noise they were seen to be alike; with more, nothing is said of it.
    assert all(each.ranks_alike for each in found[::2])


@pytest.mark.parametrize("world", [2, 3, 8])
def test_a_rank_that_leads_the_climb_from_its_onset_to_its_end_is_named(world: int) -> None:
    for seed in range(20):
        found = climbing(world, seed=seed, noise=0.2, loud=seed % world)
        assert (found.rank, found.ranks_alike) == (seed % world, False)


def test_a_rank_that_was_loud_before_has_not_led_the_climb() -> None:
    buffer = RecordBuffer(world_size=2, layers=0, finalized=0)
    norms = [*([1.0] * 50), 8.0, 64.0, 512.0]
    for rank, times in enumerate((1.0, 5.0)):
        local = [times * norm for norm in norms]
        batch = steps(1, norms, flags=[pb.LOCAL_NORMS] * len(norms), local_norm=local).steps
        buffer.write(rank, decode(batch, 0), now=0.0)
    found = verdict([*({"norm": norm, "loss": 2.0} for norm in norms), {"norm": NAN, "loss": NAN}], buffer=buffer)
    assert (found.cause, found.rank, found.ranks_alike) == ("exploding_gradients", None, False)


def test_where_nothing_is_known_of_the_ranks_they_are_not_called_alike() -> None:
    found = verdict([*quiet(), *climb(), {"norm": NAN, "loss": NAN}])
    assert (found.rank, found.ranks_alike) == (None, False)


def test_the_multiple_of_the_others_median_leaves_out_the_rank_itself() -> None:
    norms = np.array([[1.0, 2.0, 3.0, 40.0], [8.0, 2.0, 4.0, 4.0]])
    for world in (2, 3, 4):
        part = norms[:, :world]
        wanted = [[row[r] / np.median(np.delete(row, r)) for r in range(world)] for row in part]
        assert multiples_of_others(part) == pytest.approx(np.array(wanted))


@pytest.mark.parametrize(
    ("calm", "says"),
    [
        ([1.3] * 60, "clip=1)"),
        ([0.42] * 60, "clip=0.4)"),
        # Faded a thousandfold before it climbed: 1 % of what was healthy, and not 0.002.
        ([2.0] * 80 + list(np.geomspace(2.0, 0.002, 40)) + [0.002] * 20, "clip=0.02)"),
        # Tiny from the start: the loss is scaled so, and a number would say nothing.
        ([5e-5] * 60, "clip near the usual norm (about 5e-05)"),
    ],
)
def test_the_norm_to_clip_at_is_a_sane_one(calm: list[float], says: str) -> None:
    blown = [calm[-1] * 8.0**power for power in range(1, 8)]
    norms = [*calm, *blown]
    found = verdict([*({"norm": norm, "loss": 2.0} for norm in norms), {"norm": NAN, "loss": NAN}])
    assert found.cause == "exploding_gradients"
    (clip,) = (line for line in found.try_ if line.startswith("clip"))
    assert says in clip


def test_a_learning_rate_that_ran_away_asks_for_no_other_initialization_or_model() -> None:
    calm = [{"norm": 1.0, "loss": 2.0, "rate": 0.1 + 0.01 * max(0, i - 60)} for i in range(100)]
    blown = [record | {"rate": 0.5} for record in climb()]
    for model in (PLAIN, DEEP, RECURRENT):
        found = verdict([*calm, *blown, {"norm": NAN, "loss": NAN, "rate": 0.5}], model=model)
        assert found.likely_root == "learning_rate"
        assert [line.split()[0] for line in found.try_] == ["a", "clip", "go"]


@pytest.mark.parametrize(("before", "cause"), [([], "sudden_nonfinite"), ([9.0, 40.0], "nonfinite_divergence")])
def test_norms_that_were_logged_after_clipping_are_said_to_be_and_the_loss_decides(
    before: list[float], cause: str
) -> None:
    clipped = [{"norm": min(1.0, 0.7 + 0.1 * (i % 10)), "loss": 2.0 + 0.01 * (i % 3)} for i in range(100)]
    found = verdict([*clipped, *({"norm": 1.0, "loss": loss} for loss in before), {"norm": NAN, "loss": NAN}])
    assert found.cause == cause
    assert any("logged after clipping, at 1" in line for line in found.evidence)
