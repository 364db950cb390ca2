"""Validates what deploy/ has for Kubernetes and Slurm, without a cluster: `make deploy-check`.

Helm itself renders and lints the chart, `kubectl kustomize` builds the base, promtool reads the rules, and each object
is held against the schemas of the Kubernetes releases below. With --write it writes the base from the chart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from helm_python import HelmError
from helm_python.chart import Chart, lint
from kubeflow.training import models as pytorch_models
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy/helm/foreshock"
KUBERNETES = ROOT / "deploy/kubernetes"
RELEASES = ("1.29", kubernetes_validate.latest_version())
"""The oldest in which an init container can stay as a side-car, and the newest that the schemas know."""
OPERATOR = {"ServiceMonitor", "PrometheusRule"}
"""Kinds of the Prometheus operator, which are not in Kubernetes' schemas."""
_HEAD = "# Written by `make kubernetes` from the chart in deploy/helm/foreshock; do not edit by hand.\n"
_BASE = {"allowUnauthenticated": True, "serviceMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}}

Object = dict[str, Any]


def rendered(values: Object) -> list[Object]:
    """The chart's objects, as Helm renders them for a release called foreshock."""
    texts = Chart.load(CHART).render(values, name="foreshock", namespace="foreshock")
    manifests = [text for path, text in sorted(texts.items()) if path.endswith(".yaml")]
    return [each for text in manifests for each in yaml.safe_load_all(text) if each]


def base() -> dict[Path, str]:
    """The objects of the base and of its operator variant that come from the chart, by path of their file."""
    objects = [each for each in rendered(_BASE) if "-dashboard-" not in each["metadata"]["name"]]
    files = {
        "base/objects.yaml": [each for each in objects if each["kind"] not in OPERATOR],
        "operator/monitoring.yaml": [each for each in objects if each["kind"] == "ServiceMonitor"],
    }
    return {
        KUBERNETES / name: _HEAD + yaml.safe_dump_all(found, sort_keys=False, width=120, allow_unicode=True)
        for name, found in files.items()
    }


def object_problems(where: str, objects: list[Object]) -> Iterator[str]:
    """What is wrong with objects, each for itself."""
    for each in objects:
        name = f"{where}: {each['kind']} {each['metadata']['name']}"
        if each["kind"] == "PrometheusRule":
            yield from (f"{name}: {line}" for line in _promtool(each["spec"]))
        elif each["kind"] not in OPERATOR:
            for release in RELEASES:
                try:
                    kubernetes_validate.validate(each, release, strict=True)
                except kubernetes_validate.ValidationError as error:
                    yield f"{name}, Kubernetes {release}: {error}"
        if len(json.dumps(each)) > 1_000_000:
            yield f"{name}: larger than an object may be"


def chart_problems() -> Iterator[str]:
    """What Helm and the schemas say of the chart, with each of its sets of values."""
    for path in sorted(CHART.glob("ci/*-values.yaml")):
        values = yaml.safe_load(path.read_text("utf-8"))
        report = lint(str(CHART), values, strict=True, namespace="foreshock")
        yield from (f"{path.name}: {each['error']}" for each in report["messages"] if each["severity"] > 1)
        yield from object_problems(path.name, rendered(values))
    for values, expected in (
        ({}, "set tokensSecret"),
        ({"allowUnauthenticated": True, "storrage": {}}, "storrage"),
        ({"allowUnauthenticated": True, "storage": {"size": "big"}}, "/storage/size"),
    ):
        try:
            Chart.load(CHART).validate_schema(values)
            rendered(values)
        except HelmError as error:
            if expected not in str(error):
                yield f"values {values}: {error}"
        else:
            yield f"values {values} are taken"


def kustomize_problems() -> Iterator[str]:
    """What kustomize and the schemas say of the base."""
    for folder in ("base", "operator"):
        done = subprocess.run(
            ("kubectl", "kustomize", str(KUBERNETES / folder)), capture_output=True, text=True, check=False
        )
        if done.returncode:
            yield f"{folder}: {done.stderr.strip()}"
            continue
        objects = list(yaml.safe_load_all(done.stdout))
        yield from object_problems(folder, objects)
        kinds = {each["kind"] for each in objects}
        charts = {each["metadata"]["name"]: each for each in rendered(_BASE) if each["kind"] == "PrometheusRule"}
        for each in objects:
            if each["kind"] == "PrometheusRule" and each["spec"] != charts[each["metadata"]["name"]]["spec"]:
                yield f"{folder}: the chart has other rules"
        if missing := ({"StatefulSet", "PodDisruptionBudget", "NetworkPolicy"} - kinds) | (
            OPERATOR - kinds if folder == "operator" else set()
        ):
            yield f"{folder}: no {', '.join(sorted(missing))}"


def training_problems() -> Iterator[str]:
    """What the models of Kubeflow, and for pods Kubernetes' schemas, say of the training examples."""
    job = yaml.safe_load((KUBERNETES / "training/trainjob.yaml").read_text("utf-8"))
    # The models drop fields that they do not know.
    if TrainerV1alpha1TrainJob.from_dict(job).to_dict() != job:
        yield "trainjob.yaml: a field that a TrainJob does not have"
    job = yaml.safe_load((KUBERNETES / "training/pytorchjob.yaml").read_text("utf-8"))
    known = set(pytorch_models.KubeflowOrgV1PyTorchJobSpec.attribute_map.values())
    known_replica = set(pytorch_models.KubeflowOrgV1ReplicaSpec.attribute_map.values())
    if unknown := set(job["spec"]) - known:
        yield f"pytorchjob.yaml: {unknown}"
    for name, replica in job["spec"]["pytorchReplicaSpecs"].items():
        if unknown := set(replica) - known_replica:
            yield f"pytorchjob.yaml: {name}: {unknown}"
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": replica["template"]["spec"]}
        yield from object_problems("pytorchjob.yaml", [pod])


def script_problems() -> Iterator[str]:
    """What shellcheck says of the scripts for Slurm."""
    scripts = sorted(map(str, (ROOT / "deploy/slurm").iterdir()))
    done = subprocess.run(
        (str(Path(sys.executable).with_name("shellcheck")), *scripts), capture_output=True, text=True, check=False
    )
    if done.returncode:
        yield done.stdout


def _promtool(spec: Object) -> list[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        yaml.safe_dump(spec, file)
        file.flush()
        done = subprocess.run(("promtool", "check", "rules", file.name), capture_output=True, text=True, check=False)
    return [done.stdout + done.stderr] if done.returncode else []


def main() -> int:
    """Print every problem. Returns 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the base from the chart")
    options = parser.parse_args()
    files = base()
    if options.write:
        for path, text in files.items():
            path.write_text(text, "utf-8")
        return 0
    problems = [
        f"{path.relative_to(ROOT)} is out of date; run: make kubernetes"
        for path, text in files.items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    for check in (chart_problems, kustomize_problems, training_problems, script_problems):
        problems += check()
    for problem in problems:
        sys.stderr.write(f"deploy-check: {problem}\n")
    if not problems:
        sys.stdout.write("deploy-check: passed\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
