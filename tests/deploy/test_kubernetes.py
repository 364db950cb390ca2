"""Objects for Kubernetes say what the rest of the repository says. `make deploy-check` holds them against schemas."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from foreshock._attach.variables import VARIABLES
from foreshock._version import __version__
from foreshock_collector.alerting.addresses import Addresses
from foreshock_collector.alerting.rule_file import rule_file
from foreshock_collector.config import config_from, misspelled_variables
from foreshock_protos import DEFAULT_GRPC_PORT, DEFAULT_HTTP_PORT
from foreshock_recorder.__main__ import _options
from grafana.dashboards import DASHBOARDS
from grafana.make import rules
from tests.support.repository import ROOT

CHART = ROOT / "deploy/helm/foreshock"
KUBERNETES = ROOT / "deploy/kubernetes"
SLURM = ROOT / "deploy/slurm"
PAGE = f"http://foreshock.foreshock:{DEFAULT_HTTP_PORT}"
AGENT = {variable.name for variable in VARIABLES}


def objects(path: str) -> dict[tuple[str, str], dict[str, Any]]:
    found = yaml.load_all((KUBERNETES / path).read_text("utf-8"), yaml.CSafeLoader)
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


@pytest.fixture(scope="module")
def base() -> dict[tuple[str, str], dict[str, Any]]:
    return objects("base/objects.yaml")


@pytest.fixture(scope="module")
def pod(base: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = base["StatefulSet", "foreshock"]["spec"]["template"]["spec"]
    return found


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container["env"]}


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


def test_the_charts_rules_and_dashboards_are_the_repositorys_own() -> None:
    assert (CHART / "files/foreshock.rules.yml").resolve() == ROOT / "deploy/prometheus/foreshock.rules.yml"
    # Links of single files: an sdist would move a folder that it meets twice.
    found = [path.resolve() for path in sorted((CHART / "files/dashboards").iterdir())]
    assert found == sorted((ROOT / "grafana/dashboards").iterdir())


def test_the_rules_in_the_cluster_are_generated_with_its_address() -> None:
    path = KUBERNETES / "operator/rules.yaml"
    assert path.read_text("utf-8") == rules(Addresses())[path], "run: make rules"
    found = objects("operator/rules.yaml")["PrometheusRule", "foreshock"]["spec"]
    assert found == yaml.load(rule_file(Addresses(collector=PAGE)), yaml.CSafeLoader)


def test_every_dashboard_is_a_config_map_of_the_base() -> None:
    base = yaml.safe_load((KUBERNETES / "base/kustomization.yaml").read_text("utf-8"))
    assert ROOT / "grafana" in {(KUBERNETES / "base" / each).resolve() for each in base["resources"]}
    made = yaml.safe_load((ROOT / "grafana/kustomization.yaml").read_text("utf-8"))
    files = [file.partition("=")[2] for each in made["configMapGenerator"] for file in each["files"]]
    assert sorted(files) == sorted(f"dashboards/{name}.json" for name in DASHBOARDS)
    assert made["generatorOptions"]["labels"] == {"grafana_dashboard": "1"}


def test_the_collector_starts_with_what_its_pod_sets_and_listens_where_its_service_leads(
    base: dict[tuple[str, str], dict[str, Any]], pod: dict[str, Any]
) -> None:
    (container,) = pod["containers"]
    settings = environment(container)
    assert misspelled_variables(settings) == []
    config = config_from([], settings | {"FORESHOCK_COLLECTOR_DATABASE": "/var/lib/foreshock/foreshock.db"})
    assert (config.host, config.public_url) == ("0.0.0.0", PAGE)
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"grpc": config.grpc_port, "http": config.http_port}
    service = base["Service", "foreshock"]["spec"]
    assert {each["targetPort"]: each["port"] for each in service["ports"]} == ports
    labels = base["StatefulSet", "foreshock"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        service["selector"],
        base["PodDisruptionBudget", "foreshock"]["spec"]["selector"]["matchLabels"],
        base["NetworkPolicy", "foreshock"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounts["database"] == str(Path(config.database).parent)


def test_the_pod_may_do_nothing_special_and_opens_no_connection(
    base: dict[tuple[str, str], dict[str, Any]], pod: dict[str, Any]
) -> None:
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    policy = base["NetworkPolicy", "foreshock"]["spec"]
    assert (policy["policyTypes"], policy["egress"]) == (["Ingress", "Egress"], [])
    # A rule without peers admits everybody.
    assert all(rule["from"] and rule["ports"] for rule in policy["ingress"])


def test_jobs_may_run_in_the_bases_namespace_and_its_page_is_there_when_nothing_can_be_stored(
    base: dict[tuple[str, str], dict[str, Any]],
) -> None:
    (namespace,) = objects("base/namespace.yaml").values()
    job = yaml.safe_load((KUBERNETES / "training/trainjob.yaml").read_text("utf-8"))
    assert job["metadata"]["namespace"] == namespace["metadata"]["name"]
    # A TrainJob has no security context; "restricted" refuses pods without one.
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "baseline"
    assert base["Service", "foreshock"]["spec"]["publishNotReadyAddresses"]


def test_every_setting_of_the_charts_values_reaches_the_collector() -> None:
    text = (CHART / "templates/statefulset.yaml").read_text("utf-8")
    named = set(re.findall(r"FORESHOCK_COLLECTOR_[A-Z_]*[A-Z]\b", text))
    assert len(named) > 5
    assert misspelled_variables(named) == []
    values = yaml.safe_load((CHART / "ci/all-values.yaml").read_text("utf-8"))
    settings = {f"FORESHOCK_COLLECTOR_{name.upper()}": str(value) for name, value in values["settings"].items()}
    assert config_from([], settings).history_days == values["settings"]["history_days"]


def test_the_rules_of_the_charts_example_are_read(tmp_path: Path) -> None:
    values = yaml.safe_load((CHART / "ci/all-values.yaml").read_text("utf-8"))
    (tmp_path / "rules.toml").write_text(values["rules"])
    assert config_from(["--config", str(tmp_path / "rules.toml")]).rules_of("llm-1").gradient.recent_alpha == 0.2


def test_training_jobs_set_only_known_variables_and_report_to_the_collectors_service() -> None:
    job = yaml.safe_load((KUBERNETES / "training/trainjob.yaml").read_text("utf-8"))
    replicas = yaml.safe_load((KUBERNETES / "training/pytorchjob.yaml").read_text("utf-8"))["spec"]
    pods = [replica["template"]["spec"] for replica in replicas["pytorchReplicaSpecs"].values()]
    for container in (job["spec"]["trainer"], *(pod["containers"][0] for pod in pods)):
        assert set(environment(container)) <= AGENT
        assert environment(container)["FORESHOCK_COLLECTOR"] == f"foreshock.foreshock:{DEFAULT_GRPC_PORT}"


def test_a_side_car_serves_the_run_and_the_rings_of_its_pod() -> None:
    job = yaml.safe_load((KUBERNETES / "training/pytorchjob.yaml").read_text("utf-8"))
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        pod = replica["template"]["spec"]
        ((side_car,), (trainer,)) = pod["initContainers"], pod["containers"]
        assert side_car["command"][:3] == ["python", "-m", "foreshock_recorder"]
        options = _options(side_car["command"][3:])
        variables = environment(trainer)
        assert (options.run, options.ring_dir) == (variables["FORESHOCK_RUN"], variables["FORESHOCK_RING_DIR"])
        assert options.collector == variables["FORESHOCK_COLLECTOR"]
        assert side_car["startupProbe"]["exec"]["command"][-1] == f"{options.ring_dir}/{options.run}/recorder.log"
        for container in (side_car, trainer):
            assert {"name": "rings", "mountPath": options.ring_dir} in container["volumeMounts"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("environment", "file", "printed"),
    [
        ({}, "FORESHOCK_COLLECTOR=monitor:4327\n", "export FORESHOCK_COLLECTOR=monitor:4327\n"),
        ({"FORESHOCK_COLLECTOR": "mine:4327"}, "FORESHOCK_COLLECTOR=monitor:4327\n", ""),
        ({}, '# ours\nFORESHOCK_RING_DIR="/my rings"\n', "export FORESHOCK_RING_DIR=/my rings\n"),
        (
            {"FORESHOCK_CA_FILE": "/mine"},
            "FORESHOCK_COLLECTOR=monitor:4327\nFORESHOCK_CA_FILE=/ca\n",
            "export FORESHOCK_COLLECTOR=monitor:4327\n",
        ),
        ({}, None, ""),
    ],
    ids=["set by the node", "set by the job", "in quotes", "one by each", "no file"],
)
def test_slurms_tasks_have_the_nodes_settings_unless_the_job_sets_them(
    environment: dict[str, str], file: str | None, printed: str, tmp_path: Path
) -> None:
    settings = tmp_path / "agent.env"
    if file is not None:
        settings.write_text(file)
    script = (SLURM / "foreshock-task-prolog.sh").read_text("utf-8").replace("/etc/foreshock/agent.env", str(settings))
    done = subprocess.run(
        ("sh", "-c", script),
        env={"PATH": "/usr/bin:/bin"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == (printed, "")


@pytest.mark.integration
@pytest.mark.skipif(os.geteuid() != 0, reason="Slurm starts the epilog as root, and only root may become another user")
def test_slurms_epilog_delivers_as_the_jobs_user_without_a_path(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    command = tmp_path / "foreshock"
    command.write_text(f'#!/bin/sh\necho "$@" as $(id -un) > {tmp_path}/called\n')
    command.chmod(0o755)
    (tmp_path / "called").touch()
    user = pwd.getpwuid(0).pw_name
    environment = {"SLURM_JOB_USER": user, "FORESHOCK": str(command)}
    subprocess.run(("/bin/sh", str(SLURM / "foreshock-epilog.sh")), env=environment, timeout=60, check=True)
    assert (tmp_path / "called").read_text() == f"recorder as {user}\n"
