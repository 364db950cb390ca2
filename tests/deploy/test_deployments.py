"""The container and systemd files: what their own tools say of them, and that they agree with what they start."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from foreshock_collector.config import Config, config_from
from foreshock_collector.settings import doc_of
from foreshock_protos import DEFAULT_GRPC_PORT, DEFAULT_HTTP_PORT
from tests.support.alerting import PROMETHEUS_CONFIG, RULES
from tests.support.repository import ROOT
from tests.support.yaml_text import parsed

DOCKER = ROOT / "deploy/docker"
COMPOSE = DOCKER / "docker-compose.yml"
DOCKERFILE = DOCKER / "Dockerfile"
UNIT = ROOT / "deploy/systemd/foreshock-collector.service"
SERVICES: dict[str, dict[str, Any]] = parsed(COMPOSE.read_text())["services"]
STAGES = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")


def said(*command: str | Path, text: str | None = None) -> str:
    done = subprocess.run(list(map(str, command)), input=text, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def environment_of_the_image() -> dict[str, str]:
    last = DOCKERFILE.read_text().rpartition("\nFROM ")[2]
    return dict(re.findall(r"(FORESHOCK_COLLECTOR_\w+)=(\S+)", "".join(re.findall(r"^ENV .*$", last, re.MULTILINE))))


@needs("docker-compose")
def test_compose_accepts_the_file() -> None:
    """Debian's docker-compose 1 knows all of it but `name`."""
    text = re.sub(r"^name: .*\n", "", COMPOSE.read_text(), flags=re.MULTILINE)
    shown = parsed(said("docker-compose", "--project-directory", DOCKER, "-f", "-", "config", text=text))
    assert set(shown["services"]) == {"collector", "trainer", "prometheus", "alertmanager", "grafana"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_is_published_on_this_machine_alone_and_may_do_nothing_special(name: str) -> None:
    service = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "user", "cap_add", "network_mode", "pid"} & service.keys()


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_container_is_given_is_there(name: str) -> None:
    service = SERVICES[name]
    if build := service.get("build"):
        assert (DOCKER / build["context"]).resolve() == ROOT
        assert ROOT / build["dockerfile"] == DOCKERFILE
        assert build["target"] in STAGES
    else:
        assert re.fullmatch(r"\S+:v?\d+\.\d+\.\d+", service["image"]), "an image without a version changes by itself"
    for volume in service.get("volumes", []):
        source, _, *mode = volume.split(":")
        if source.startswith("."):
            assert mode == ["ro"]
            assert (DOCKER / source).exists(), source


def test_the_images_run_as_nobody_in_particular() -> None:
    text = DOCKERFILE.read_text()
    *before, runtime = text.partition("AS runtime")
    assert "USER" not in "".join(before)
    assert re.findall(r"^USER (.*)$", runtime, re.MULTILINE) == ["65532:65532"]
    assert all(f"FROM runtime AS {name}\n" in runtime for name in ("collector", "trainer"))
    assert STAGES[-1] == "collector"


def test_the_collector_starts_with_what_image_and_compose_set_and_listens_where_the_others_look() -> None:
    config = config_from([], environment_of_the_image() | SERVICES["collector"]["environment"])
    assert config.host == "0.0.0.0"
    (volume,) = SERVICES["collector"]["volumes"]
    assert str(Path(config.database).parent) == volume.partition(":")[2]
    published = {port.partition(":")[2] for port in SERVICES["collector"]["ports"]}
    assert published == {f"{port}:{port}" for port in (config.grpc_port, config.http_port)}
    assert f"EXPOSE {DEFAULT_GRPC_PORT} {DEFAULT_HTTP_PORT}\n" in DOCKERFILE.read_text()
    assert SERVICES["trainer"]["environment"]["FORESHOCK_COLLECTOR"] == f"collector:{config.grpc_port}"


def test_the_image_has_what_each_setting_needs() -> None:
    (extras,) = re.findall(r"foreshock-\*\.whl\)\[(.*)\]", DOCKERFILE.read_text())
    needed = {extra for each in fields(Config) for extra in re.findall(r"foreshock\[(\w+)\]", doc_of(each))}
    assert needed == {"otlp"}
    assert set(extras.split(",")) == {"collector", *needed}


def test_the_image_alone_lets_nobody_in() -> None:
    assert config_from([], environment_of_the_image()).host == "127.0.0.1"


@pytest.mark.integration
def test_prometheus_of_the_containers_is_the_shipped_one_but_for_addresses(tmp_path: Path) -> None:
    shipped = PROMETHEUS_CONFIG.read_text().replace(f"127.0.0.1:{DEFAULT_HTTP_PORT}", f"collector:{DEFAULT_HTTP_PORT}")
    shipped = shipped.replace("127.0.0.1:9093", "alertmanager:9093")
    ours = DOCKER / "prometheus.yml"
    assert parsed(ours.read_text()) == parsed(shipped)
    # As the containers see them: side by side.
    for file in (ours, RULES):
        shutil.copy(file, tmp_path)
    assert "rules found" in said("promtool", "check", "config", tmp_path / ours.name)


@pytest.mark.integration
@needs("systemd-analyze")
def test_systemd_accepts_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    command = "/opt/foreshock/bin/foreshock"
    assert f"ExecStart={command} collector\n" in UNIT.read_text()
    unit.write_text(UNIT.read_text().replace(command, sys.executable))
    assert said("systemd-analyze", "verify", unit) == ""
    # From 0, safe, to 100; an unhardened service has 96.
    said("systemd-analyze", "security", "--offline=true", "--threshold=15", unit)


@pytest.mark.integration
@needs("systemd-analyze")
def test_systemd_accepts_the_units_of_training_machines(tmp_path: Path) -> None:
    units = [UNIT.with_name(f"foreshock-recorder@.{kind}") for kind in ("service", "timer")]
    command = "/opt/foreshock/bin/foreshock"
    assert f"ExecStart={command} recorder\n" in units[0].read_text()
    for unit in units:
        (tmp_path / unit.name).write_text(unit.read_text().replace(command, sys.executable))
    copies = [tmp_path / unit.name for unit in units]
    assert said("systemd-analyze", "verify", *copies) == ""
    # It reads and removes files of its user, in shared memory: a little less closed than the collector.
    said("systemd-analyze", "security", "--offline=true", "--threshold=25", copies[0])


def test_the_unit_keeps_its_database_where_systemd_lets_it_write() -> None:
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    settings = dict(re.findall(r"^Environment=(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE))
    config = config_from([], settings)
    assert Path(config.database).parent == Path("/var/lib") / parser["Service"]["StateDirectory"]
    assert config.host == "127.0.0.1"
