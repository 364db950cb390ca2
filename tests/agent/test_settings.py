"""Settings: arguments, their twins in the environment, and what is said about wrong ones."""

from __future__ import annotations

from typing import Any

import pytest

from foreshock._attach.settings import Settings, kill_switch, settings_from
from foreshock._control.clip import AdaptiveClip, NormClip, ValueClip
from foreshock._errors import SettingsError

TWINS: list[tuple[str, str, Any]] = [
    ("clip", "0.5", NormClip(max_norm=0.5)),
    ("clip", "none", None),
    ("clip", "adaptive", AdaptiveClip()),
    ("clip", "Adaptive 0.5", AdaptiveClip(max_norm=0.5)),
    ("skip", "1", True),
    ("collector", "monitor:4327", "monitor:4327"),
    ("collector", "[::1]:4327", "[::1]:4327"),
    ("experiment", "digits", "digits"),
    ("run", "crimson otter", "crimson otter"),
    ("local_norms", "0", False),
    ("local_norms", "yes", True),
    ("attach_timeout", "2.5", 2.5),
    ("recorder_python", "/opt/monitor/bin/python", "/opt/monitor/bin/python"),
    ("strict", "1", True),
]


def test_without_anything_said_the_defaults_hold() -> None:
    assert settings_from({}) == Settings(
        clip=None,
        skip=False,
        dry_run=False,
        collector="",
        experiment="default",
        run="",
        local_norms=True,
        attach_timeout=60.0,
        mirror=(),
        recorder_python="",
        strict=False,
    )


@pytest.mark.parametrize(("setting", "text", "value"), TWINS, ids=lambda v: str(v))
def test_every_setting_has_a_twin_in_the_environment(setting: str, text: str, value: Any) -> None:
    assert getattr(settings_from({f"FORESHOCK_{setting.upper()}": text}), setting) == value


@pytest.mark.parametrize("setting", sorted({setting for setting, _, _ in TWINS}))
def test_an_empty_variable_is_not_set(setting: str) -> None:
    assert settings_from({f"FORESHOCK_{setting.upper()}": ""}) == settings_from({})


ARGUMENTS: list[tuple[str, Any, str]] = [
    ("clip", ValueClip(clip_value=1.0), "9"),
    ("skip", True, "0"),
    ("collector", "here:1", "there:2"),
    ("experiment", "mine", "theirs"),
    ("run", "mine", "theirs"),
    ("local_norms", True, "0"),
]


@pytest.mark.parametrize(("setting", "value", "text"), ARGUMENTS, ids=lambda v: str(v))
def test_an_argument_wins_over_its_twin(setting: str, value: Any, text: str) -> None:
    settings = settings_from({f"FORESHOCK_{setting.upper()}": text}, **{setting: value})
    assert getattr(settings, setting) == value


WRONG: list[tuple[str, Any]] = [
    ("clip", "a lot"),
    ("clip", "-1"),
    ("clip", "adaptive -1"),
    ("clip", "none 1"),
    ("skip", "some"),
    ("dry_run", "gray"),
    ("collector", "monitor"),
    ("collector", "monitor:"),
    ("collector", ":4327"),
    ("collector", "monitor:99999"),
    ("collector", "monitor:²"),
    ("collector", "http://monitor:4327"),
    ("collector", "::1:4327"),
    ("collector", "my monitor:4327"),
    ("collector", "monitor:4327\n"),
    ("experiment", "x" * 129),
    ("experiment", "two\nlines"),
    ("run", "x" * 129),
    ("run", "\x1b[31mred"),
    ("local_norms", "maybe"),
]


@pytest.mark.parametrize(("setting", "wrong"), WRONG, ids=ascii)
def test_a_wrong_value_is_one_error_that_names_where_it_was_said(setting: str, wrong: Any) -> None:
    argument: Any = -1.0 if setting == "clip" else wrong
    with pytest.raises(SettingsError, match=rf"^{setting}: ") as raised:
        settings_from({}, **{setting: argument})
    assert isinstance(raised.value, ValueError)
    variable = f"FORESHOCK_{setting.upper()}"
    with pytest.raises(SettingsError, match=rf"^{variable}: "):
        settings_from({variable: wrong})


@pytest.mark.parametrize(
    ("variable", "wrong"),
    [("ATTACH_TIMEOUT", wrong) for wrong in ("soon", "0", "-1", "nan", "inf", "1e9")] + [("STRICT", "2")],
)
def test_a_wrong_variable_without_an_argument_is_named_too(variable: str, wrong: str) -> None:
    with pytest.raises(SettingsError, match=rf"^FORESHOCK_{variable}: .*{wrong}"):
        settings_from({f"FORESHOCK_{variable}": wrong})


@pytest.mark.parametrize(
    ("setting", "wrong"), [("collector", 4327), ("experiment", ""), ("run", 7), ("local_norms", "no way")]
)
def test_an_argument_of_another_type_is_an_error_too(setting: str, wrong: Any) -> None:
    with pytest.raises(SettingsError, match=rf"^{setting}: "):
        settings_from({}, **{setting: wrong})


@pytest.mark.parametrize("policy", [{"clip": "1.0"}, {"skip": "1"}], ids=str)
def test_a_dry_run_needs_something_to_try(policy: dict[str, str]) -> None:
    environment = {f"FORESHOCK_{name.upper()}": text for name, text in policy.items()}
    assert settings_from(environment, dry_run=True).dry_run
    with pytest.raises(SettingsError, match=r"^dry_run: nothing to simulate; also pass clip or skip"):
        settings_from({}, dry_run=True)


@pytest.mark.parametrize(
    ("text", "on"), [("1", True), ("true", True), (" ON ", True), ("0", False), ("no", False), ("", False)]
)
def test_the_kill_switch_is_a_switch(text: str, on: bool) -> None:
    assert kill_switch({"FORESHOCK_DISABLED": text}) is on
    assert kill_switch({}) is False


def test_a_kill_switch_that_says_neither_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r"^FORESHOCK_DISABLED: must be 1 or 0.*'please'"):
        kill_switch({"FORESHOCK_DISABLED": "please"})
