"""Which step an observation belongs to, whatever a script's habit, and what is left where no step came."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from foreshock import _log
from foreshock._arithmetic.arithmetic import arithmetic_for
from foreshock._measure.script import Observations, observation_of
from foreshock._step import Observation, Step

ARITHMETIC = arithmetic_for(torch.device("cpu"))


class Script:
    """Plays a training's events; `records` is what would be written: (number, stepped)."""

    def __init__(self) -> None:
        self.observations = Observations()
        self.records: list[tuple[Observation | None, bool]] = []

    def observe(self, number: int) -> None:
        told = Observation(number, float(number))
        newest = self.records[-1] if self.records else (None, False)
        of_newest, left = self.observations.add(told, unobserved=newest == (None, True))
        if of_newest:
            self.records[-1] = told, self.records[-1][1]
        if left is not None:
            self.records.append((left, False))

    def backward(self, *, dropped: bool = True, averaged: bool = True) -> None:
        if dropped and averaged and self.observations.passed:
            self.records.append((self.observations.skipped(), False))
        self.observations.backward_ended(averaged=averaged)

    def step(self) -> None:
        step = Step(sequence=1, number=0)
        self.observations.stepped(step)
        self.records.append((step.observation, True))

    def play(self, *iterations: str) -> list[tuple[int | None, bool]]:
        """o: observes its number. b: backward. k: one that keeps the gradients of the last. a: one that only
        accumulates. s: the optimizer's step."""
        for number, events in enumerate(iterations):
            for event in events:
                if event == "o":
                    self.observe(number)
                elif event == "s":
                    self.step()
                else:
                    self.backward(dropped=event == "b", averaged=event != "a")
        return [(told and told.step, stepped) for told, stepped in self.records]


HABITS = ["obs", "bos", "bso"]


@pytest.mark.parametrize("habit", HABITS)
def test_each_step_has_its_own_observation_whatever_the_habit(habit: str) -> None:
    assert Script().play(habit, habit, habit) == [(0, True), (1, True), (2, True)]


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_a_step_that_a_scaler_leaves_out_has_its_own_too_and_shifts_no_other(habit: str, left_out: int) -> None:
    iterations = [habit] * 4
    iterations[left_out] = habit.replace("s", "")
    assert Script().play(*iterations) == [(n, n != left_out) for n in range(4)]


@pytest.mark.parametrize("habit", HABITS)
def test_several_steps_left_out_from_the_start_are_each_told(habit: str) -> None:
    without = habit.replace("s", "")
    assert Script().play(without, without, habit, habit) == [(0, False), (1, False), (2, True), (3, True)]


def test_a_batch_that_the_script_leaves_out_before_backward_is_told() -> None:
    assert Script().play("obs", "o", "obs") == [(0, True), (1, False), (2, True)]


@pytest.mark.parametrize("iteration", ["obokobs", "oboksob", "boboks"])
def test_gradients_that_accumulate_over_several_backward_passes_are_one_step(iteration: str) -> None:
    steps = Script().play(*[iteration.replace("b", "k")] * 3)
    assert all(stepped for _, stepped in steps) and len(steps) == 3


def test_observing_each_micro_batch_that_only_accumulates_leaves_nothing_out() -> None:
    assert Script().play("oaoaobs", "oaoaobs") == [(0, True), (1, True)]


def test_a_script_that_observes_some_steps_hits_those() -> None:
    assert Script().play("bs", "bs", "bso", "bs", "bso") == [
        (None, True), (None, True), (2, True), (None, True), (4, True),
    ]  # fmt: skip
    assert Script().play("obs", "bs", "obs", "bs") == [(0, True), (None, True), (2, True), (None, True)]


def test_loss_and_step_told_by_two_calls_are_one_observation() -> None:
    observations = Observations()
    observations.add(Observation(None, 2.5), unobserved=False)
    assert observations.add(Observation(7, None), unobserved=False) == (False, None)
    observations.backward_ended(averaged=True)
    step = Step(sequence=1, number=0)
    observations.stepped(step)
    assert (step.number, step.observation) == (7, Observation(7, 2.5))


def test_gradients_that_another_training_drops_before_an_observation_are_not_what_was_observed() -> None:
    # A GAN's discriminator: its loss is told and its step made; then the generator's backward passes through it.
    told = Script().play("obs", "b", "obs", "b", "obs")
    assert [number for number, stepped in told if stepped] == [0, 2, 4]
    assert [number for number, stepped in told if not stepped] == [None, None]


@pytest.mark.parametrize("step", [3, np.int64(3), torch.tensor(3)])
def test_a_step_may_be_any_whole_number(step: Any) -> None:
    assert observation_of(None, step, ARITHMETIC) == Observation(3, None)


@pytest.mark.parametrize(
    ("loss", "step", "line"),
    [
        (1.0, 0.2, "observe: step must be an integer, not 0.2; steps are counted instead"),
        (1.0, "7", "observe: step must be an integer, not '7'; steps are counted instead"),
        (1.0, 2**70, "observe: step must be an integer, not 1180591620717411303424; steps are counted instead"),
        (1.0, 2**63 - 1, "observe: step must be an integer, not 9223372036854775807; steps are counted instead"),
        (1.0, math.nan, "observe: step must be an integer, not nan; steps are counted instead"),
        ("x", 7, "observe: loss must be a tensor or a number, not 'x'; it is not recorded"),
        ([1.0, 2.0], 7, "observe: loss must be a tensor or a number, not of type list; it is not recorded"),
    ],
    ids=str,
)
def test_what_is_no_step_or_no_loss_costs_one_line_that_names_the_argument(
    caplog: pytest.LogCaptureFixture, loss: Any, step: Any, line: str
) -> None:
    _log._logged.clear()
    for _ in range(2):
        told = observation_of(loss, step, ARITHMETIC)
    assert told == (Observation(None, 1.0) if loss == 1.0 else Observation(7, None))
    assert caplog.messages == [line]
