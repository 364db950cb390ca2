"""Settings of the probe: what attach was told, or else the environment, or else the default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from foreshock._clip import Clip, NormClip, ValueClip, clip_from
from foreshock._errors import SettingsError

CLIP = "FORESHOCK_CLIP"
COLLECTOR = "FORESHOCK_COLLECTOR"
EXPERIMENT = "FORESHOCK_EXPERIMENT"
RUN = "FORESHOCK_RUN"
LOCAL_NORMS = "FORESHOCK_LOCAL_NORMS"
DISABLED = "FORESHOCK_DISABLED"
ATTACH_TIMEOUT = "FORESHOCK_ATTACH_TIMEOUT"
RECORDER_PYTHON = "FORESHOCK_RECORDER_PYTHON"
STRICT = "FORESHOCK_STRICT"
"""Set to 1 in tests: an internal error of the probe is raised instead of counted."""

_NAME_LENGTH = 128


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one rank watches."""

    clip: Clip | None
    """Clipping policy; None only observes."""
    collector: str
    """host:port of the collector's gRPC service; empty: this machine, default port."""
    experiment: str
    """What the run belongs to; groups runs on dashboards."""
    run: str
    """Name of the run; empty: taken from the launcher, or made by rank 0."""
    local_norms: bool
    """Measure this rank's own gradient before the all-reduce, in DDP's communication hook."""
    disabled: bool
    """The kill switch."""
    attach_timeout: float
    """Seconds to wait for the other ranks to attach."""
    recorder_python: str
    """Python interpreter for the recorder; empty: this one."""
    strict: bool
    """Raise internal errors."""


def settings_from(
    environment: Mapping[str, str] | None = None,
    *,
    clip: float | NormClip | ValueClip | None = None,
    collector: str | None = None,
    experiment: str | None = None,
    run: str | None = None,
    local_norms: bool | None = None,
) -> Settings:
    """Arguments win over the environment. Raises `SettingsError` naming what is wrong."""
    env = os.environ if environment is None else environment
    return Settings(
        clip=clip_from(clip if clip is not None else env.get(CLIP)),
        collector=_address(collector if collector is not None else env.get(COLLECTOR, "")),
        experiment=_name("experiment", experiment if experiment is not None else env.get(EXPERIMENT, "default")),
        run=_name("run", run if run is not None else env.get(RUN, ""), may_be_empty=True),
        local_norms=_switch(LOCAL_NORMS, env.get(LOCAL_NORMS, "1")) if local_norms is None else local_norms,
        disabled=_switch(DISABLED, env.get(DISABLED, "0")),
        attach_timeout=_seconds(ATTACH_TIMEOUT, env.get(ATTACH_TIMEOUT, "60")),
        recorder_python=env.get(RECORDER_PYTHON, ""),
        strict=_switch(STRICT, env.get(STRICT, "0")),
    )


def _address(text: str) -> str:
    if not text:
        return ""
    host, colon, port = text.rpartition(":")
    bare = not host.startswith("[") and ":" in host
    if not colon or not host or bare or "/" in text or not port.isdigit() or not 0 < int(port) < 65536:
        raise SettingsError(f"collector: {text!r} is not an address; write host:port, as in 'monitor:4327'")
    return text


def _name(argument: str, text: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(text, str) or (not text and not may_be_empty) or len(text) > _NAME_LENGTH:
        raise SettingsError(f"{argument}: must be a text of 1 to {_NAME_LENGTH} characters, not {text!r}")
    if not text.isprintable():
        raise SettingsError(f"{argument}: {text!r} has characters that cannot be printed")
    return text


def _switch(name: str, text: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    value = known.get(text.strip().lower() or "0")
    if value is None:
        raise SettingsError(f"{name} must be 1 or 0, not {text!r}")
    return value


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86400:
        raise SettingsError(f"{name} must be a number of seconds, not {text!r}")
    return value
