"""Which part may know which other, what an import may do, and where a number may stand."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import foreshock
import foreshock_protos
from tests.support.repository import ROOT
from tests.support.yaml_text import parsed

PACKAGES = {
    "foreshock": ROOT / "agent/foreshock",
    "foreshock_recorder": ROOT / "agent/foreshock_recorder",
    "foreshock_collector": ROOT / "collector/foreshock_collector",
    "foreshock_protos": ROOT / "protos/foreshock_protos",
}
ARROWS = {
    "foreshock": {
        "foreshock_protos.columns",
        "foreshock_recorder.layout",
        "foreshock_recorder.paths",
        "foreshock_recorder.process",
        "foreshock_recorder.records",
        "foreshock_recorder.ring",
    },
    "foreshock_recorder": {"foreshock_protos"},
    "foreshock_collector": {"foreshock_protos", "foreshock_recorder.doctor"},
    "foreshock_protos": set(),
}
"""Package: what it may import of the others."""
PARTS: dict[str, dict[str, set[str]]] = {
    "foreshock": {
        "__init__": {"_attach", "_control", "_errors", "_handle", "_hooks", "_version"},
        "_arithmetic": {"_torch"},
        "_attach": {
            "_arithmetic",
            "_control",
            "_errors",
            "_handle",
            "_hooks",
            "_kernels",
            "_log",
            "_measure",
            "_mirror",
            "_output",
            "_stages",
            "_torch",
            "_version",
            "_watch",
        },
        "_cli": {"_version"},
        "_control": {"_arithmetic", "_errors", "_log", "_step", "_torch"},
        "_demo_training": set(),
        "_errors": set(),
        "_handle": set(),
        "_kernels": {"_arithmetic", "_control", "_measure", "_step", "_torch"},
        "_hooks": {"_arithmetic", "_log", "_measure", "_torch"},
        "_log": set(),
        "_measure": {"_arithmetic", "_control", "_log", "_step", "_torch"},
        "_mirror": {"_log"},
        "_output": {"_arithmetic", "_log", "_measure", "_step"},
        "integrations": {"_attach", "_control", "_handle", "_log", "_run", "_watch"},
        "_run": {"_arithmetic", "_attach", "_errors", "_log", "_output", "_watch"},
        "_stages": {"_arithmetic", "_control", "_kernels", "_measure", "_step"},
        "_step": {"_arithmetic"},
        "_torch": set(),
        "_training_facts": {"_attach", "_errors"},
        "_version": set(),
        "_watch": {
            "_arithmetic",
            "_control",
            "_handle",
            "_hooks",
            "_log",
            "_measure",
            "_mirror",
            "_output",
            "_stages",
            "_step",
            "_torch",
        },
    },
    "foreshock_collector": {
        "records": set(),
        "settings": set(),
        "analysis": {"records", "settings"},
        "catalogue": {"analysis"},
        "alerting": {"analysis", "catalogue"},
        "access": set(),
        "clock": set(),
        "text": set(),
        "log_format": set(),
        "notify": {"alerting", "catalogue"},
        "config": {"analysis", "log_format", "notify", "settings"},
        "resources": set(),
        "state": {"analysis", "catalogue", "records"},
        "ingest": {"access", "catalogue", "records", "state", "text"},
        "web": {"access", "alerting", "analysis", "catalogue", "ingest", "notify", "records", "resources", "state"},
        "server": {"access", "clock", "config", "ingest", "notify", "state", "web"},
        "commands": {
            "alerting",
            "analysis",
            "config",
            "log_format",
            "notify",
            "records",
            "server",
            "resources",
            "state",
            "web",
        },
        "__main__": {"commands"},
    },
}
"""Package, then its sub-package or top-level module: what that may import of the others."""
COLLECTOR = "foreshock_collector"
PURE = {"asyncio", "datetime", "socket", "sqlite3", "time", "threading"}
"""Clocks, databases and sockets: `analysis` and `records` import none of them."""
MOST_LINES = 400
LOADED = "import json, sys; print(json.dumps(sorted(sys.modules)))"


def sources(package: str) -> list[Path]:
    """Modules written by hand."""
    return [
        path
        for path in sorted(PACKAGES[package].rglob("*.py"))
        if PACKAGES["foreshock_protos"] / "v1" not in path.parents
    ]


def module_names(package: str) -> list[str]:
    paths = [path.relative_to(PACKAGES[package].parent).with_suffix("") for path in sources(package)]
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


def in_a_fresh_process(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def loaded_by(*modules: str) -> set[str]:
    """Every module that a process has once it has imported these."""
    return set(in_a_fresh_process("".join(f"import {module}\n" for module in modules) + LOADED))


def top_level(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


@cache
def imported_by(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of everything that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_of_the_others_only_what_its_arrow_points_at(package: str) -> None:
    for path in sources(package):
        for line, name in imported_by(path):
            if name.partition(".")[0] in PACKAGES.keys() - {package}:
                allowed = any(f"{name}.".startswith(f"{target}.") for target in ARROWS[package])
                assert allowed, f"{path.relative_to(ROOT)}:{line} imports {name}"


@pytest.mark.parametrize("package", PARTS)
def test_the_parts_of_a_package_import_each_other_only_along_their_arrows(package: str) -> None:
    arrows = PARTS[package]
    seen: dict[str, set[str]] = {part: set() for part in arrows}
    for path in sources(package):
        part = path.relative_to(PACKAGES[package]).with_suffix("").parts[0]
        for line, name in imported_by(path):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            # What the package's own `__init__` gives is no part of it.
            if top == package and target in arrows and target != part:
                assert target in arrows[part], f"{path.relative_to(ROOT)}:{line} imports {name}"
                seen[part].add(target)
    assert seen == arrows, "an arrow that nothing follows"


@pytest.mark.parametrize("part", ["analysis", "records"])
def test_what_decides_knows_no_clock_database_or_socket(part: str) -> None:
    for path in sorted((PACKAGES[COLLECTOR] / part).rglob("*.py")):
        for line, name in imported_by(path):
            assert name.partition(".")[0] not in PURE, f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_only_what_a_script_passes_is_asked_whether_it_is_a_tensor() -> None:
    """The arithmetic of a step is chosen once, at attach."""
    asking = {
        path.name
        for path in sources("foreshock")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"isinstance", "torch.is_tensor"}
        if "Tensor" in ast.unparse(node) or "is_tensor" in ast.unparse(node)
    }
    assert asking == {"pass_loss.py", "script.py"}


@pytest.mark.integration
def test_the_ring_needs_only_the_standard_library_and_the_table_of_columns() -> None:
    loaded = loaded_by("foreshock_recorder.ring")
    assert {module for module in loaded if module.startswith("foreshock_protos.")} == {"foreshock_protos.columns"}
    brought = top_level(loaded - loaded_by("json"))
    assert brought - sys.stdlib_module_names == {"foreshock_protos", "foreshock_recorder"}


@pytest.mark.integration
@pytest.mark.parametrize("package", ["foreshock_recorder", "foreshock_collector"])
def test_recorder_and_collector_run_without_torch(package: str) -> None:
    assert not top_level(loaded_by(*module_names(package))) & {"torch", "foreshock"}


@pytest.mark.integration
def test_the_recorder_needs_nothing_of_the_collectors_packages() -> None:
    assert not top_level(loaded_by(*module_names("foreshock_recorder"))) & {
        "aiohttp",
        "numpy",
        "prometheus_client",
        "rich",
    }


@pytest.mark.integration
def test_the_probe_brings_neither_grpc_nor_protobuf_nor_triton_into_the_training_process() -> None:
    # Triton is not to be had everywhere; a test below checks what those modules import. Trainers are the user's own.
    others = ("_kernels", "integrations.")
    names = [name for name in module_names("foreshock") if not any(other in name for other in others)]
    loaded = loaded_by(*names, "foreshock._kernels.choice")
    assert not top_level(loaded) & {"grpc", "foreshock_collector", "triton"}
    assert not any(module.startswith(("google.protobuf", "foreshock_protos.v1")) for module in loaded)


def test_the_kernels_import_nothing_but_triton_torch_and_the_probe() -> None:
    of_kernels = [path for path in sources("foreshock") if path.parent.name == "_kernels"]
    imported = top_level({name for path in of_kernels for _, name in imported_by(path)})
    known = {"foreshock", "foreshock_protos", "foreshock_recorder", "torch", "triton"}
    assert {"torch", "triton"} <= imported <= known | set(sys.stdlib_module_names)


@pytest.mark.integration
def test_the_foreshock_command_does_not_wait_for_torch() -> None:
    """It starts in milliseconds, and works on a machine that has only the collector."""
    assert "torch" not in loaded_by("foreshock._cli")


@pytest.mark.integration
def test_importing_the_probe_starts_no_thread_process_or_socket() -> None:
    before, after = in_a_fresh_process(
        """
import json, os
from pathlib import Path

def running():
    links = (os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return len(os.listdir("/proc/self/task")), len(children), sum(link.startswith("socket:") for link in links)

import torch.distributed, torch.nn.parallel
before = running()
import foreshock
for name in foreshock.__all__:
    getattr(foreshock, name)
print(json.dumps([before, running()]))
"""
    )
    assert after == before


def test_what_foreshock_exports_is_what_it_says() -> None:
    assert len(set(foreshock.__all__)) == len(foreshock.__all__)
    visible = {
        name
        for name in {*dir(foreshock), *foreshock.__all__}
        if not name.startswith("_") and name != "annotations" and not isinstance(getattr(foreshock, name), ModuleType)
    }
    assert visible == {name for name in foreshock.__all__ if not name.startswith("_")}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_too_long_to_read(package: str) -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(package)}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_test_module_is_too_long_and_none_imports_another() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        assert len(path.read_text().splitlines()) <= MOST_LINES, path.relative_to(ROOT)
        for line, name in imported_by(path):
            shared = not name.startswith("tests.") or not re.search(r"\.(test_\w+|conftest)\.", f"{name}.")
            assert shared, f"{path.relative_to(ROOT)}:{line} imports {name}: what tests share lies in tests/support"


@pytest.mark.parametrize("port", ["DEFAULT_GRPC_PORT", "DEFAULT_HTTP_PORT"])
def test_a_default_port_is_named_once(port: str) -> None:
    value = getattr(foreshock_protos, port)
    named = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in PACKAGES
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value == value
    ]
    assert [place.partition(":")[0] for place in named] == ["protos/foreshock_protos/__init__.py"], named


def test_prometheus_is_sent_to_the_default_port() -> None:
    config = parsed((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    targets = config["scrape_configs"][0]["static_configs"][0]["targets"]
    assert targets == [f"127.0.0.1:{foreshock_protos.DEFAULT_HTTP_PORT}"]


def test_every_dependency_is_pinned_for_development_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    pins = {}
    files = ("requirements-dev.txt", "requirements-trainers.txt")
    for line in [line for file in files for line in (ROOT / file).read_text().splitlines()]:
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (version,) = (each.version for each in pin.specifier if each.operator == "==")
            pins[canonicalize_name(pin.name)] = version
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_the_changelog_describes_this_version_or_what_is_not_released_yet() -> None:
    sections = re.findall(
        r"^## \[(.+?)\](.*?)(?=^## |\Z)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE | re.DOTALL
    )
    described = {title for title, text in sections if re.search(r"^- ", text, re.MULTILINE)}
    assert described & {foreshock.__version__, "Unreleased"}
    assert [title for title, _ in sections].count("Unreleased") <= 1
