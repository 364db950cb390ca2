"""The documentation names nothing that does not exist, and leaves out nothing that does."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import fields, replace
from importlib.metadata import entry_points

import pytest

from foreshock._attach.variables import COLLECTOR_PREFIX, VARIABLES
from foreshock_collector.alerting.alerts import ALERTS
from foreshock_collector.catalogue import CATALOGUE, Kind
from foreshock_collector.config import Config
from grafana.dashboards import DASHBOARDS
from tests.support.documents import CHECKS, Document, Names, missing_anchors, omissions, repository_documents
from tests.support.repository import ROOT

FOREIGN_OPTIONS = {
    "torchrun": {
        *("--nnodes", "--nproc-per-node", "--max-restarts", "--rdzv-id", "--rdzv-backend", "--rdzv-endpoint"),
    },
    "prometheus": {"--config.file"},
    "docker": {"--build", "--target"},
    "helm": {"--namespace", "--create-namespace", "--set"},
    "kubectl": {"--kustomize"},
    "pip": {"--no-deps"},
    "py-spy": {"--pid"},
}
FOREIGN_WORDS = {
    *("foreshock_recorder", "foreshock_collector", "foreshock_protos"),  # packages
    *("foreshock_clip", "foreshock_clip_global_only"),  # variants of benchmarks/step.py
    *("trainer_state.json", "metrics.json", "scalars.json", "log.txt", "report.html"),  # users' files
    *("foreshock-RUN.html", "foreshock-lr0.3.html", "tokens.toml"),
}
SKIPPED = {"__pycache__", "node_modules"}


def options(command: str) -> frozenset[str]:
    """Return the options that a command's own parser prints."""
    (entry,) = entry_points(group="foreshock.commands", name=command)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        entry.load()(["--help"])
    return frozenset(re.findall(r"^ +(?:-\w(?: \w+)?, )?(--[a-z][\w-]*)", printed.getvalue(), re.MULTILINE)) - {
        "--help"
    }


def files() -> frozenset[str]:
    tops = [
        path
        for path in ROOT.iterdir()
        if not path.name.startswith(".") or path.name in (".ci", ".pre-commit-config.yaml")
    ]
    found = [*tops, *(path for top in tops if top.is_dir() for path in top.rglob("*"))]
    return frozenset(str(path.relative_to(ROOT)) for path in found if not SKIPPED & set(path.parts))


@pytest.fixture(scope="module")
def names() -> Names:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    folders = ("benchmarks", "examples", "grafana", "docs", "collector/foreshock_collector/alerting")
    scripts = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    samples = {f"{s.name}_{part}" for s in CATALOGUE if s.kind is Kind.HISTOGRAM for part in ("bucket", "sum", "count")}
    settings = {f"{COLLECTOR_PREFIX}{setting.name.upper()}" for setting in fields(Config) if setting.name != "runs"}
    return Names(
        alerts=frozenset(alert.name for alert in ALERTS),
        series=frozenset(series.name for series in CATALOGUE) | samples,
        variables=frozenset(variable.name for variable in VARIABLES) | settings | {f"{COLLECTOR_PREFIX}CONFIG"},
        dashboards=frozenset(DASHBOARDS),
        options={entry.name: options(entry.name) for entry in entry_points(group="foreshock.commands")},
        targets=frozenset(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE)),
        listed_targets=frozenset(re.findall(r"^([a-z][\w-]*):.*## ", makefile, re.MULTILINE)),
        script_options=frozenset(
            re.findall(r'"(--[a-z][\w-]*)"', "".join(path.read_text("utf-8") for path in scripts))
        ),
        foreign_options={program: frozenset(found) for program, found in FOREIGN_OPTIONS.items()},
        foreign_words=frozenset(FOREIGN_WORDS),
        tests=frozenset(
            name
            for path in (ROOT / "tests").rglob("*.py")
            for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
        ),
        paths=files(),
    )


@pytest.mark.parametrize("document", repository_documents(), ids=lambda document: document.path)
def test_a_document_names_only_what_exists(document: Document, names: Names) -> None:
    assert {kind: found for kind, check in CHECKS.items() if (found := check(document, names))} == {}


def test_every_link_to_a_heading_has_one() -> None:
    assert missing_anchors(repository_documents()) == []


def test_the_documents_leave_nothing_out(names: Names) -> None:
    assert omissions(repository_documents(), names) == []


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("alert", "See ForeshockRunVanished.", "ForeshockRunVanished"),
        ("alert", "Foreshock has three alerts.", "three alerts"),
        ("series", "`foreshock_gradient_weather`", "foreshock_gradient_weather"),
        ("series", "`rate(foreshock_step_total[1m])`", "foreshock_step_total"),
        ("environment variable", "Set FORESHOCK_COLECTOR.", "FORESHOCK_COLECTOR"),
        ("environment variable", "    export FORESHOCK_COLLECTOR_PORT=1", "FORESHOCK_COLLECTOR_PORT"),
        ("dashboard", "the `weather` dashboard", "weather"),
        ("dashboard", "| dashboard | what |\n| --- | --- |\n| `weather` | sun |\n", "weather"),
        ("dashboard", "Foreshock ships four dashboards.", "four dashboards"),
        ("dashboard", "<http://127.0.0.1:3000/d/foreshock-weather>", "weather"),
        ("command", "Run `foreshock observe`.", "observe"),
        ("command", "```console\nyou$ foreshock sttus\n```", "sttus"),
        ("make target", "`make everything`", "everything"),
        ("make target", "    make benchmark  # slow", "benchmark"),
        ("option", "`foreshock status --markdown`", "--markdown"),
        ("option", "Add `--verbose`.", "--verbose"),
        ("option", "    torchrun --nproc-per-host 2 examples/train.py", "--nproc-per-host"),
        ("option", "    torchrun examples/train.py --learning-rate 1", "--learning-rate"),
        ("test", "| `test_nothing_at_all[fused]` |", "test_nothing_at_all"),
        ("file", "`agent/foreshock/_lookout.py`", "agent/foreshock/_lookout.py"),
        ("file", "`judging.py` decides", "judging.py"),
        ("file", "see docs/weather.md for more", "docs/weather.md"),
        ("file", "[rules](weather.md)", "weather.md"),
        ("file", "![a run](screenshots/weather.png)", "screenshots/weather.png"),
        ("file", "    prometheus --config.file=deploy/weather.yml", "deploy/weather.yml"),
        ("file", "`grafana/boards/`", "grafana/boards"),
    ],
)
def test_a_wrong_name_is_found(kind: str, text: str, found: str, names: Names) -> None:
    assert CHECKS[kind](Document("docs/wrong.md", f"# Wrong\n\n{text}\n"), names) == [found]


def test_a_link_to_a_heading_that_is_gone_is_found() -> None:
    here, there = (
        Document("docs/a.md", "# A\n\n[b](b.md#old-name), [self](#a)\n"),
        Document("docs/b.md", "# B\n\n## New name\n"),
    )
    assert missing_anchors([here, there]) == ["docs/a.md: b.md#old-name"]


@pytest.mark.parametrize(
    ("path", "left_out", "found"),
    [
        ("docs/metrics.md", "ForeshockRunDied", "alert ForeshockRunDied"),
        ("docs/metrics.md", "foreshock_last_spike_step", "series foreshock_last_spike_step"),
        ("docs/grafana.md", "`layers`", "dashboard layers"),
        ("docs/configuration.md", "`FORESHOCK_RING_DIR`", "variable FORESHOCK_RING_DIR"),
        ("docs/configuration.md", "--ready-file", "option --ready-file of collector"),
        ("docs/commands.md", "--markdown", "option --markdown of report"),
        ("docs/commands.md", "## foreshock recorder", "command recorder"),
    ],
)
def test_what_a_document_leaves_out_is_found(path: str, left_out: str, found: str, names: Names) -> None:
    changed = [
        replace(each, text=each.text.replace(left_out, "")) if each.path == path else each
        for each in repository_documents()
    ]
    assert found in omissions(changed, names)


def test_a_missing_runbook_an_unnamed_target_and_an_unlinked_page_are_found(names: Names) -> None:
    gone = "docs/runbooks/ForeshockRunDied.md"
    without = [
        replace(each, text=each.text.replace("make soak", "")) for each in repository_documents() if each.path != gone
    ]
    alone = Document("docs/alone.md", "# Alone\n")
    assert sorted(omissions([*without, alone], names)) == [
        "link to docs/alone.md",
        "make soak",
        "runbook of ForeshockRunDied",
    ]
