"""Variables in the environment: one table, and a word about a name that is misspelled."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from foreshock._attach.settings import Settings
from foreshock._attach.variables import COLLECTOR_PREFIX, VARIABLES, unknown_variables
from tests.support.repository import ROOT

NAMES = {variable.name for variable in VARIABLES}


@pytest.mark.parametrize(
    ("misspelled", "meant"),
    [
        ("FORESHOCK_COLECTOR", "FORESHOCK_COLLECTOR"),
        ("FORESHOCK_RUN_NAME", "FORESHOCK_RUN"),
        ("FORESHOCK_DISABLE", "FORESHOCK_DISABLED"),
        ("FORESHOCK_LOCAL_NORM", "FORESHOCK_LOCAL_NORMS"),
    ],
)
def test_a_misspelled_variable_is_told_with_the_nearest_name(misspelled: str, meant: str) -> None:
    (line,) = unknown_variables({misspelled: "x", "PATH": "y", meant: "z"})
    assert line == f"{misspelled} is not a Foreshock variable and is ignored; did you mean {meant}?"


def test_a_name_that_is_near_none_is_told_alone_and_known_ones_are_not() -> None:
    known = {**dict.fromkeys(NAMES, ""), f"{COLLECTOR_PREFIX}DATABASE": ""}
    assert unknown_variables(known) == []
    assert unknown_variables({**known, "FORESHOCK_QQQQ": ""}) == [
        "FORESHOCK_QQQQ is not a Foreshock variable and is ignored"
    ]


def test_the_table_has_every_setting_and_every_name_that_the_code_reads() -> None:
    assert {f"FORESHOCK_{field.name.upper()}" for field in fields(Settings)} <= NAMES
    code = "".join(path.read_text() for folder in ("agent", "collector") for path in (ROOT / folder).rglob("*.py"))
    read = set(re.findall(r'"(FORESHOCK_[A-Z_]*[A-Z])"', code))
    assert read <= NAMES and len(read) > 5
