"""What the rule calls a spike, a build-up, and neither."""

from __future__ import annotations

import math
import random

from foreshock_collector.detection import Detector, Event


def feed(norms: list[float], detector: Detector | None = None) -> list[Event]:
    detector = detector or Detector()
    events: list[Event] = []
    for step, norm in enumerate(norms):
        bad = 0 if math.isfinite(norm) else 1
        events += detector.update(attempt=0, sequence=step + 1, step=step, norm=norm, loss=None, nonfinite=bad)
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
    again = Detector(again.state())
    for step, norm in enumerate(norms[30:]):
        again.update(attempt=0, sequence=31 + step, step=30 + step, norm=norm, loss=None, nonfinite=0)
    assert again.state() == first.state()
