"""Settings of the collector, and rules of its runs."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock_collector.analysis.rules import DEFAULT, Rules
from foreshock_collector.config import Config, ConfigError, config_from
from foreshock_collector.server import Server
from tests.support.fuzzing import bounded
from tests.support.streams import Stream, config, families, hello, serving, steps, value


def test_a_run_has_the_rules_of_every_pattern_that_fits_its_name(tmp_path: Path) -> None:
    file = tmp_path / "collector.toml"
    file.write_text(
        '[runs."llm-*"]\nrecovered_after = 100\n[runs."llm-*".gradient]\nspike_z = 8\n[runs."*-7b"]\nlead_steps = 64\n'
    )
    chosen = config_from(["--config", str(file)], {})
    rules = chosen.rules_of("llm-7b")
    assert (rules.recovered_after, rules.gradient.spike_z, rules.lead_steps) == (100, 8.0, 64)
    assert chosen.rules_of("other") == DEFAULT

    async def test() -> None:
        async with Server(config(tmp_path, runs={"quiet": {"gradient": {"spike_z": 1e9}}})) as server:
            stream = Stream(server)
            for run in ("quiet", "usual"):
                await stream.send(hello(run), steps(1, [*[1.0] * 60, 50.0, 1.0], run=run))
            await stream.stored(62)
            found = await families(server)
            assert value(found, "foreshock_gradient_spikes", run="quiet") == 0
            assert value(found, "foreshock_gradient_spikes", run="usual") == 1
            await stream.close()

    serving(test())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ack-seconds", "30"], "--ack-seconds must be at most 5, not 30"),
        (["--host", "0.0.0.0"], "--allow-unauthenticated"),
        (["--grpc-port", "many"], "--grpc-port must be a whole number"),
        (["--http-port", "70000"], "--http-port"),
        (["--config", "/nowhere.toml"], "/nowhere.toml"),
    ],
)
def test_a_wrong_setting_is_named(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_from(arguments, {})


_VALUES: Any = st.recursive(
    st.booleans() | st.integers(-(2**70), 2**70) | st.sampled_from((0.5, -1.0, 1e308)) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
_SETTINGS = (*(each.name for each in fields(Config)), "gradient", "nothing")
_LINES = st.builds(lambda name, value: f"{name} = {json.dumps(value)}", st.sampled_from(_SETTINGS), _VALUES)
_TABLES = st.sampled_from(('[runs."llm-*"]', "[runs]", "[runs.a.gradient]", "[[runs]]", "[host]"))


@bounded(100)
@given(text=st.lists(st.one_of(_LINES, _LINES, _TABLES), max_size=6).map("\n".join) | st.text(max_size=40))
def test_any_file_is_taken_or_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "foreshock.toml"
    path.write_text(text, encoding="utf-8", errors="replace")
    found, why = None, ""
    try:
        found = config_from(["--config", str(path)], {})
    except ConfigError as error:
        why = str(error)
    assert why if found is None else isinstance(found.rules_of("llm-7"), Rules)


def test_a_file_that_is_nested_too_deeply_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "foreshock.toml"
    path.write_text("host = " + "[" * 100_000)
    with pytest.raises(ConfigError, match=str(path)):
        config_from(["--config", str(path)], {})
