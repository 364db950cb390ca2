"""The dashboards against Grafana's own types of the classic model, of which `make test` makes a JSON schema."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from grafana.dashboards import DASHBOARDS
from tests.support.repository import ROOT

SCHEMA = ROOT / ".grafana-schema/dashboard.json"
BUILT = {name: build() for name, build in DASHBOARDS.items()}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    if not SCHEMA.exists():
        pytest.skip("Grafana's schema is made by `make test`, or by `make .grafana-schema/dashboard.json`")
    made: dict[str, Any] = json.loads(SCHEMA.read_text())
    return made


def objections(dashboard: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    dashboard = copy.deepcopy(dashboard)
    for annotation in dashboard["annotations"]["list"]:
        # What a query of an annotation holds is its data source's own, here Prometheus'; the schema knows other fields.
        assert {"expr", "refId"} <= annotation.pop("target").keys()
        annotation.pop("useValueForTime")
        annotation.pop("titleFormat")
    errors = jsonschema.Draft7Validator(schema).iter_errors(dashboard)
    return [f"{'/'.join(map(str, error.path))}: {error.message}" for error in errors]


@pytest.mark.parametrize("name", sorted(BUILT))
def test_grafanas_own_schema_has_nothing_against_a_dashboard(name: str, schema: dict[str, Any]) -> None:
    assert objections(BUILT[name], schema) == []


def test_the_schema_objects_to_what_is_wrong(schema: dict[str, Any]) -> None:
    changes: tuple[Callable[[dict[str, Any]], object], ...] = (
        lambda d: d.update(graphTooltip=7),
        lambda d: d.update(unheard_of=1),
        lambda d: d["panels"][0]["gridPos"].update(w="wide"),
        lambda d: d["templating"]["list"][0].pop("type"),
        lambda d: d["links"][0].update(type="road"),
    )
    for change in changes:
        wrong = copy.deepcopy(BUILT["run"])
        change(wrong)
        assert objections(wrong, schema)
