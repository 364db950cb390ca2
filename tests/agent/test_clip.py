"""The clipping policies: what they accept, and their arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from foreshock._arithmetic.arithmetic import arithmetic_for
from foreshock._arithmetic.device import DeviceArithmetic
from foreshock._control.clip import EPSILON, AdaptiveClip, NormClip, ValueClip, clip_from, clip_from_text
from foreshock._errors import SettingsError

CPU = torch.device("cpu")
DEVICE = DeviceArithmetic(CPU)


def divisor(norm: float, max_norm: float) -> float:
    return float(NormClip(max_norm=max_norm).divisor(DEVICE, torch.tensor(norm, dtype=torch.float64)))


@pytest.mark.parametrize("norm", [0.0, 0.3, 0.5 - 2e-6])
def test_a_gradient_within_the_limit_is_divided_by_exactly_1(norm: float) -> None:
    assert divisor(norm, 0.5) == 1.0


@pytest.mark.parametrize("norm", [0.5, 0.7, 1e3, 1e25, 1e200])
def test_a_gradient_beyond_it_is_divided_as_stock_clipping_does(norm: float) -> None:
    assert divisor(norm, 0.5) == (norm + EPSILON) / 0.5


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_left_alone(norm: float) -> None:
    assert divisor(norm, 0.5) == 1.0


@pytest.mark.parametrize(
    ("ceiling", "max_norm", "limit"), [(2.0, None, 2.0), (2.0, 0.5, 0.5), (0.25, 0.5, 0.25), (math.inf, 0.5, 0.5)]
)
def test_adaptive_clipping_takes_the_lower_of_history_and_limit(
    ceiling: float, max_norm: float | None, limit: float
) -> None:
    policy, history = AdaptiveClip(max_norm=max_norm), torch.tensor(ceiling, dtype=torch.float64)
    for norm in (limit / 2, limit * 3, math.nan, math.inf):
        found = float(policy.divisor(DEVICE, torch.tensor(norm, dtype=torch.float64), history))
        assert found == (1.0 if norm != limit * 3 else (norm + EPSILON) / limit)


def test_adaptive_clipping_without_history_and_limit_divides_by_exactly_1() -> None:
    norm, none = torch.tensor(1e9, dtype=torch.float64), torch.tensor(math.inf, dtype=torch.float64)
    assert float(AdaptiveClip().divisor(DEVICE, norm, none)) == 1.0


def test_a_value_policy_tells_whether_it_would_change_anything(arithmetic: str) -> None:
    math_ = arithmetic_for(CPU)
    policy = ValueClip(clip_value=0.5)
    gradients = [torch.tensor([0.1, -0.5]), torch.tensor([0.4]), torch.zeros(0)]
    assert not policy.would_clamp(math_, gradients) and policy.would_clamp(math_, gradients, 0.9)
    assert policy.would_clamp(math_, [torch.tensor([0.1, -0.6])])


def test_a_number_is_a_largest_norm_and_none_is_no_clipping() -> None:
    assert clip_from(2) == NormClip(max_norm=2.0) and clip_from(None) is None
    for policy in (NormClip(max_norm=1.0), ValueClip(clip_value=1.0), AdaptiveClip(), AdaptiveClip(max_norm=1.0)):
        assert clip_from(policy) is policy


WRONG: list[Any] = [-1.0, 0, math.inf, math.nan, True, "1.0", "none", [1.0], torch.tensor(1.0)]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_any_other_clip_is_a_value_error_that_names_the_argument(wrong: Any) -> None:
    with pytest.raises(SettingsError, match=r"^clip: ") as raised:
        clip_from(wrong)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("wrong", [-1.0, 0, math.inf, math.nan, True, "1.0"], ids=str)
def test_a_policy_refuses_a_limit_that_is_none(wrong: Any) -> None:
    with pytest.raises(SettingsError, match=r"^clip: max_norm must be a positive number.*clip=None only observes"):
        NormClip(max_norm=wrong)
    with pytest.raises(SettingsError, match=r"^clip: max_norm must be a positive number"):
        AdaptiveClip(max_norm=wrong)
    with pytest.raises(SettingsError, match=r"^clip: clip_value must be a positive number"):
        ValueClip(clip_value=wrong)


def test_the_environment_says_a_number_or_none() -> None:
    assert clip_from_text("FORESHOCK_CLIP", " 0.5 ") == NormClip(max_norm=0.5)
    assert clip_from_text("FORESHOCK_CLIP", "None") is None


@pytest.mark.parametrize("wrong", ["a lot", "-1", "0", "nan", "inf", "1.0,2.0"])
def test_a_wrong_environment_is_named_by_its_variable(wrong: str) -> None:
    with pytest.raises(SettingsError, match=r"^FORESHOCK_CLIP: must be a positive number") as raised:
        clip_from_text("FORESHOCK_CLIP", wrong)
    assert repr(wrong) in str(raised.value)


def test_policies_say_what_they_are() -> None:
    assert str(AdaptiveClip()) == "adaptive" and str(AdaptiveClip(max_norm=0.5)) == "adaptive 0.5"
    assert str(NormClip(max_norm=1.0)) == "norm 1" and str(ValueClip(clip_value=0.25)) == "value 0.25"
