"""Settings of the probe: an argument of attach, else the environment, else the default."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foreshock._control.clip import Clip, clip_from, clip_from_text
from foreshock._errors import SettingsError

MIRROR_TOOLS = ("tensorboard", "wandb", "mlflow", "trackio")
_NAME_LENGTH = 128
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Holds the settings of one rank."""

    clip: Clip | None
    """Clipping policy; None only observes."""
    skip: bool
    """Leave out steps whose gradient is not finite or far beyond the run's history, within a budget."""
    dry_run: bool
    """Clip and leave out nothing, and count what would have been."""
    collector: str
    """host:port of the collector's gRPC service; empty: this machine, default port."""
    experiment: str
    """What the run belongs to; groups runs on dashboards."""
    run: str
    """Name of the run; empty: taken from the launcher, or made by rank 0."""
    local_norms: bool
    """Measure this rank's own gradient before the all-reduce."""
    attach_timeout: float
    """Seconds to wait for the other ranks to attach."""
    mirror: tuple[str, ...]
    """Experiment tools to mirror the run in, of `MIRROR_TOOLS`."""
    recorder_python: str
    """Python interpreter for the recorder; empty: this one."""
    strict: bool
    """Raise internal errors instead of counting them: for tests."""


def settings_from(
    environment: Mapping[str, str] | None = None,
    *,
    clip: float | Clip | None = None,
    skip: bool | None = None,
    dry_run: bool | None = None,
    collector: str | None = None,
    experiment: str | None = None,
    run: str | None = None,
    local_norms: bool | None = None,
) -> Settings:
    """Arguments win over the environment, where FORESHOCK_CLIP is the twin of `clip` and so on; empty is not set.

    Raises `SettingsError` naming the argument or the variable.
    """
    env = os.environ if environment is None else environment

    def setting(argument: str, value: Any, default: Any) -> tuple[str, Any]:
        name = f"FORESHOCK_{argument.upper()}"
        return (argument, value) if value is not None else (name, env.get(name) or default)

    settings = Settings(
        clip=_clip(*setting("clip", clip, None)),
        skip=_switch(*setting("skip", skip, False)),
        dry_run=_switch(*setting("dry_run", dry_run, False)),
        collector=_address(*setting("collector", collector, "")),
        experiment=_name(*setting("experiment", experiment, "default")),
        run=_name(*setting("run", run, ""), may_be_empty=True),
        local_norms=_switch(*setting("local_norms", local_norms, True)),
        attach_timeout=_seconds(*setting("attach_timeout", None, 60.0)),
        mirror=_tools(*setting("mirror", None, "")),
        recorder_python=env.get("FORESHOCK_RECORDER_PYTHON", ""),
        strict=_switch(*setting("strict", None, False)),
    )
    if settings.dry_run and settings.clip is None and not settings.skip:
        raise SettingsError("dry_run: nothing to simulate; also pass clip or skip")
    return settings


def kill_switch(environment: Mapping[str, str] | None = None) -> bool:
    """FORESHOCK_DISABLED is on: asked before any argument is looked at, so that it turns off a wrong one too."""
    env = os.environ if environment is None else environment
    return _switch("FORESHOCK_DISABLED", env.get("FORESHOCK_DISABLED") or False)


def _clip(name: str, value: Any) -> Clip | None:
    return clip_from(value) if name == "clip" or value is None else clip_from_text(name, value)


def _address(name: str, text: Any) -> str:
    if text == "":
        return ""
    match = _ADDRESS.fullmatch(text) if isinstance(text, str) else None
    if match is None or not 0 < int(match[1]) < 65536:
        raise SettingsError(f"{name}: {text!r} is not an address; write host:port, as in 'monitor:4327'")
    return str(text)


def _name(name: str, text: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(text, str) or (not text and not may_be_empty) or len(text) > _NAME_LENGTH:
        raise SettingsError(f"{name}: must be a string of 1 to {_NAME_LENGTH} characters, not {text!r}")
    if not text.isprintable():
        raise SettingsError(f"{name}: {text!r} contains unprintable characters")
    return text


def _switch(name: str, value: Any) -> bool:
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    on = known.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(on, bool):
        raise SettingsError(f"{name}: must be 1 or 0 (an argument: True or False), not {value!r}")
    return on


def _tools(name: str, text: str) -> tuple[str, ...]:
    tools = tuple(dict.fromkeys(tool for part in text.split(",") if (tool := part.strip().lower())))
    for tool in tools:
        if tool not in MIRROR_TOOLS:
            raise SettingsError(f"{name}: {tool!r} is none of {', '.join(MIRROR_TOOLS)}; separate several by commas")
    return tools


def _seconds(name: str, value: Any) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86400:
        raise SettingsError(f"{name}: must be a number of seconds, not {value!r}")
    return seconds
