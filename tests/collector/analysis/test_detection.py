"""What the rule calls a spike, a build-up, and neither."""

from __future__ import annotations

import math
import random
from dataclasses import asdict
from typing import Any

import pytest

from foreshock_collector.analysis.channel import ChannelState
from foreshock_collector.analysis.detection import Detector, Event
from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.state.encoding import decode, encode


def feed(norms: list[float], detector: Detector | None = None, rules: Rules = DEFAULT) -> list[Event]:
    detector = detector or Detector()
    events: list[Event] = []
    for step, norm in enumerate(norms):
        bad = 0 if math.isfinite(norm) else 1
        where: dict[str, Any] = {"attempt": 0, "sequence": step + 1, "step": step}
        events += detector.update(norm=norm, loss=None, nonfinite=bad, rules=rules, **where)
    return events


def noise(count: int, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [math.exp(rng.gauss(0, 0.1)) for _ in range(count)]


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


def test_a_quiet_run_has_no_events() -> None:
    assert feed(noise(5000)) == []


def test_a_lone_spike_is_noted_and_is_no_build_up() -> None:
    assert kinds(feed([*noise(100), 50.0, *noise(100, 1)])) == ["spike"]


def test_a_climb_is_a_build_up_before_the_nan() -> None:
    events = feed([*noise(100), 2.0, 6.0, 40.0, 400.0, math.nan])
    build_up = next(event for event in events if event.kind == "build_up")
    assert build_up.step < 104
    assert events[-1].kind == "nonfinite"


def test_one_climb_is_one_build_up() -> None:
    events = feed([*noise(100), *(2.0**i for i in range(12))])
    assert kinds(events).count("build_up") == 1


def test_a_nan_never_blinds_the_rule() -> None:
    events = feed([*noise(100), math.nan, math.inf, *noise(60, 1), 3.0, 9.0, 81.0])
    assert kinds(events)[:2] == ["nonfinite", "recovered"]
    assert "build_up" in kinds(events)[2:]


def test_a_lasting_new_level_is_accepted() -> None:
    events = feed([*noise(100), *(20 * n for n in noise(200, 1))])
    assert all(event.step < 130 for event in events)


def test_the_state_survives_being_stored() -> None:
    first, again = Detector(), Detector()
    norms = noise(60)
    feed(norms, first)
    feed(norms[:30], again)
    again = decode(encode(again), Detector)
    for step, norm in enumerate(norms[30:]):
        again.update(attempt=0, sequence=31 + step, step=30 + step, norm=norm, loss=None, nonfinite=0)
    assert again == first


def test_a_run_that_explodes_from_its_start_is_warned_of_before_any_warm_up_ends() -> None:
    events = feed([1.0, 0.9, 1.1, 4.0, 40.0, 4e3, math.inf])
    assert [event.kind for event in events] == ["build_up", "nonfinite"]
    assert events[0].step == 5


def test_a_planned_jump_of_the_learning_rate_is_followed_and_an_explosion_after_it_still_seen() -> None:
    def judged(norms: list[float], rates: list[float]) -> list[str]:
        detector, found = Detector(), []
        for step, (norm, rate) in enumerate(zip(norms, rates, strict=True)):
            bad = 0 if math.isfinite(norm) else 1
            found += detector.update(
                attempt=0, sequence=step + 1, step=step, norm=norm, loss=None, rate=rate, nonfinite=bad
            )
        return kinds(found)

    rates = [0.1] * 100 + [0.5] * 100
    calm = [*noise(100), *(5 * n for n in noise(100, 1))]
    assert "build_up" not in judged(calm, rates)
    assert "build_up" in judged(calm, [0.1] * 200)
    assert judged([*noise(100), 5.0, 20.0, 300.0, math.inf], rates[:104])[-2:] == ["build_up", "nonfinite"]


def test_a_batch_of_values_is_judged_as_its_values_one_by_one() -> None:
    rng = random.Random(7)
    values = [math.exp(rng.gauss(0, 0.3) + (3 if rng.random() < 0.01 else 0)) for _ in range(3000)]
    values[700], values[800], values[900] = math.nan, 0.0, math.inf
    values[1500:1506] = [10.0**i for i in range(6)]
    values[2000:] = [30 * value for value in values[2000:]]
    at_once, one_by_one = ChannelState(), ChannelState()
    found = at_once.scan(values, DEFAULT.gradient)
    again = []
    for place, value in enumerate(values):
        again += [event._replace(place=place) for event in one_by_one.scan((value,), DEFAULT.gradient)]
    assert found == again
    assert len(found) > 10
    assert asdict(at_once) == asdict(one_by_one)


def test_rules_are_changed_by_name_and_a_wrong_one_is_named() -> None:
    rules = DEFAULT.with_overrides({"recovered_after": 100, "gradient": {"spike_z": 8}})
    assert (rules.recovered_after, rules.gradient.spike_z, rules.loss) == (100, 8.0, DEFAULT.loss)
    strict = DEFAULT.with_overrides({"gradient": {"spike_z": 1e6}})
    assert kinds(feed([*noise(100), 50.0])) == ["spike"]
    assert feed([*noise(100), 50.0], rules=strict) == []
    for wrong, says in (
        ({"spike_z": 8}, "unknown rule spike_z"),
        ({"gradient": {"spikes": 8}}, "unknown rule gradient.spikes"),
        ({"gradient": 8}, "gradient is a group"),
        ({"recovered_after": 2.5}, "recovered_after must be a whole number"),
        ({"gradient": {"alpha": "high"}}, "gradient.alpha must be a number"),
        ({"gradient": {"alpha": -1}}, "from 0 to 0.9999"),
    ):
        with pytest.raises(ValueError, match=says):
            DEFAULT.with_overrides(wrong)
