"""Measure Foreshock on one GPU: whether it is right there, and what it costs a training step.

One command in the root of the repository, one card, no network:

    python -m benchmarks.gpu --output results

1. The tests marked `gpu`, two gloo ranks on the card among them.
2. The bandwidth of a copy on the device, which bounds whatever reads gradients.
3. For each model and both kinds of bucket, training steps of all variants over NCCL in a world of one. Variants whose
   name ends in `_several` take the path of several ranks all the same: local norms, and the small sum over ranks.

Every variant has its own model, its own DDP and its own fused AdamW. A round takes some steps of each, in an order that
changes from round to round, and a variant's cost is the median over rounds of its time divided by that of `stock_clip`
in the same round. Between rounds the host's part of a single step is timed, which is what counts where steps are small.
A profile of a few steps, taken afterwards, gives launches, copies, waits for the device and time on the device.

Variants that do not fit into the card's memory together are measured in groups, each beside `stock_clip`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import foreshock
from benchmarks.gpu_models import MODELS
from benchmarks.gpu_step import BUCKETS, VARIANTS, Result, copy_bandwidth, groups, models_that_fit, train

ROOT = Path(__file__).parents[1]
ROUNDS = 30
_MEASUREMENT_SECONDS = 1800.0


def measure(options: argparse.Namespace) -> None:
    """In a process of its own: one model with one kind of bucket. Writes its rows and the bandwidth as JSON."""
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if cuda else "gloo"
        if cuda:
            torch.cuda.set_device(device)
        store = Path(folder) / "store"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
        copy = copy_bandwidth(device) if cuda else None
        (name,), (buckets,) = options.models, options.buckets
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] if cuda else sys.maxsize
        rows: list[Result] = []
        for together in groups(options.variants, models_that_fit(MODELS[name].parameter_count(), free)):
            rows += train(together, name, buckets, device, options.rounds, copy)
            # A model and its hooks refer to each other: without this, the next group finds the card still full.
            gc.collect()
            torch.cuda.empty_cache()
        known = {row.variant: row for row in reversed(rows)}
        ordered = [asdict(known[variant]) for variant in options.variants]
        Path(options.result).write_text(json.dumps({"copy_bytes_per_second": copy, "rows": ordered}))
        dist.destroy_process_group()


def run_measurement(model: str, buckets: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start `measure` for a model; what it wrote, or why it did not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = folder / "result.json"
        arguments = ["--models", model, "--buckets", buckets, "--rounds", str(options.rounds)]
        arguments += ["--device", options.device, "--result", str(result), "--variants", *options.variants]
        environment = {
            **os.environ,
            "FORESHOCK_RING_DIR": str(folder / "rings"),
            # Nothing listens there: records stay in the ring.
            "FORESHOCK_COLLECTOR": "127.0.0.1:9",
            "FORESHOCK_STRICT": "1",
        }
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.gpu", *arguments],
                cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=_MEASUREMENT_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"rows": [], "error": f"{model}, {buckets}: not done after {_MEASUREMENT_SECONDS:g} s"}
        if done.returncode != 0:
            return {"rows": [], "error": f"{model}, {buckets}: {(done.stdout + done.stderr)[-4000:]}"}
        answer: dict[str, Any] = json.loads(result.read_text())
        return answer


def run_tests() -> dict[str, Any]:
    """Run the tests marked `gpu`; whether they passed, and the end of what they printed."""
    # The kernels are tried on the card, not in Triton's interpreter.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return {"passed": done.returncode == 0, "output": (done.stdout + done.stderr)[-8000:]}


def machine() -> dict[str, Any]:
    """Describe what the figures were measured on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,  # type: ignore[no-untyped-call]
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "foreshock": foreshock.__version__,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows, a block for each model and kind of bucket, as Markdown."""
    lines = []
    kinds = dict.fromkeys((row["model"], row["parameters"], row["buckets"]) for row in rows)
    for model, parameters, buckets in kinds:
        lines += [f"### {model}: {parameters / 1e6:.1f} M parameters, gradients as {buckets} of the buckets", ""]
        lines += [
            "| variant | of stock clipping | step ms | host ms | launches | copies | waits | device ms | passes |"
        ]
        lines += ["| --- " * 9 + "|"]
        for row in rows:
            if (row["model"], row["buckets"]) == (model, buckets):
                ratio = f"{row['ratio_to_stock_clip']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
                host = f"{row['host_ms']:.3f} ({row['host_ms_low']:.3f} to {row['host_ms_high']:.3f})"
                cells = [f"`{row['variant']}`", ratio, f"{row['step_ms']:.3f}", host]
                counts = row["profile"]
                if counts is None:
                    cells += [""] * 4
                else:
                    cells += [f"{counts[name]:.1f}" for name in ("launches", "copies", "waits")]
                    cells += [f"{counts['device_us'] / 1e3:.3f}"]
                passes = row["gradient_passes"]
                cells += ["" if passes is None else f"{passes:.2f}"]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--buckets", choices=BUCKETS, nargs="+", default=list(BUCKETS))
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS), help="with stock_clip")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=Path(), help="folder for gpu.json and gpu.md")
    parser.add_argument("--no-tests", action="store_true", help="only measure")
    parser.add_argument("--device", default="cuda:0", help="cpu tries the benchmark itself, without a profile")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if "stock_clip" not in options.variants:
        parser.error("--variants: stock_clip must be among them: all others are divided by it")
    return options


def main() -> int:
    """Test, measure, print; 1 if a test or a measurement failed."""
    options = parse()
    if options.result:
        measure(options)
        return 0
    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --device cpu tries the benchmark itself")
    results: dict[str, Any] = {"machine": machine(), "tests": None, "rows": [], "errors": []}
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.no_tests:
        results["tests"] = run_tests()
        print(results["tests"]["output"], flush=True)
    for model in options.models:
        for buckets in options.buckets:
            answer = run_measurement(model, buckets, options)
            results["rows"] += answer["rows"]
            if "error" in answer:
                results["errors"].append(answer["error"])
                print(answer["error"], file=sys.stderr, flush=True)
            else:
                results["copy_bytes_per_second"] = answer["copy_bytes_per_second"]
                print(table(answer["rows"]), flush=True)
            # After each, so that a run that is cut off has its results so far.
            (options.output / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
            (options.output / "gpu.md").write_text(table(results["rows"]))
    failed = results["errors"] or (results["tests"] is not None and not results["tests"]["passed"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
