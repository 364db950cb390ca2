"""What Foreshock costs a training step: ratios to stock clipping, step by step in one process group.

Every variant has its own model of the same size, its own DDP and its own fused AdamW. A round takes one step of each,
in an order that changes from round to round; a variant's cost is the median over rounds of its time divided by that of
`stock_clip` in the same round. Rounds are spread over several launches, since where a model happens to lie in memory
stays with it for as long as its process lives; variants that do not fit into memory together are measured in groups,
each beside `stock_clip`. Recorder and collector run, and every step must have been stored at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import foreshock

VARIANTS = ("plain", "stock_clip", "item_monitor", "observe", "foreshock_clip", "foreshock_clip_global_only")
MAX_NORM = {"always": 1e-3, "never": 1e9}
LAYERS, BATCH = 8, 8
WARM_UP_ROUNDS = 5
LAUNCHES = 5
ROUNDS = {1.0: 60, 25.0: 30}
"""Of a launch, up to so many million parameters; beyond them `FEWEST_ROUNDS`."""
FEWEST_ROUNDS = 12
MEMORY_BYTES = 14e9
"""For the models of all variants and ranks together: weights, gradients, two moments, and buckets of their own."""
_COLLECTOR_SECONDS = 60.0

Step = Callable[[], None]


def build(millions: float, *, views: bool) -> DistributedDataParallel:
    """A stack of square linear layers with about so many parameters. views: gradients are views of DDP's buckets."""
    width = int((millions * 1e6 / LAYERS) ** 0.5)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return DistributedDataParallel(nn.Sequential(*layers), gradient_as_bucket_view=views)


def monitor_by_hand(model: nn.Module, max_norm: float) -> None:
    """What people write themselves: a loop over parameters that reads each norm, then a multiplication."""
    total = 0.0
    for parameter in model.parameters():
        if parameter.grad is not None:
            total += parameter.grad.norm().item() ** 2
    norm: float = total**0.5
    if norm > max_norm:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(max_norm / (norm + 1e-6))


def variant_step(name: str, millions: float, clipping: str, *, views: bool) -> tuple[Step, foreshock.Watch | None]:
    """One training step of a variant, to be called again and again."""
    model = build(millions, views=views)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    max_norm = MAX_NORM[clipping]
    watch = None
    if name == "observe":
        watch = foreshock.attach(model, optimizer, run=name)
    elif name.startswith("foreshock"):
        local = name != "foreshock_clip_global_only"
        watch = foreshock.attach(model, optimizer, clip=max_norm, run=name, local_norms=local)
    width = next(model.parameters()).shape[0]
    x, y = torch.randn(BATCH, width), torch.randn(BATCH, width)

    def step() -> None:
        # Views stay where they are; a gradient of DDP's default is dropped, as `zero_grad` does by itself.
        optimizer.zero_grad(set_to_none=not views)
        loss = ((model(x) - y) ** 2).mean()
        if watch is not None:
            watch.observe(loss=loss)
        loss.backward()
        if name == "stock_clip":
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        elif name == "item_monitor":
            monitor_by_hand(model, max_norm)
        optimizer.step()

    return step, watch


def measure(options: argparse.Namespace) -> None:
    """In each rank: rounds over all variants; rank 0 writes seconds per round and variant."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    random = np.random.default_rng(options.launch)
    order = list(options.variants)
    random.shuffle(order)
    shape = (options.parameters[0], options.clipping[0])
    steps = {name: variant_step(name, *shape, views=options.bucket_views) for name in order}
    seconds: list[dict[str, float]] = []
    for number in range(WARM_UP_ROUNDS + options.rounds):
        # Each variant follows each other one as often: none always runs on the caches of the same neighbor. Not at
        # first: a training without a step between the first two of a later one is taken for finished.
        if number >= 2:
            random.shuffle(order)
        took = {}
        for name in order:
            dist.barrier()
            began = time.perf_counter()
            steps[name][0]()
            took[name] = time.perf_counter() - began
        seconds.append(took)
    for _, watch in steps.values():
        if watch is not None:
            watch.detach()
    if dist.get_rank() == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path(options.result).write_text(json.dumps({"seconds": seconds[WARM_UP_ROUNDS:], "peak_rss_bytes": peak}))
    dist.destroy_process_group()


def launch(folder: Path, collector: str, ranks: int, *arguments: str) -> dict[str, Any]:
    """Run `measure` under torchrun; what rank 0 wrote."""
    result = folder / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FORESHOCK_COLLECTOR": collector, "FORESHOCK_STRICT": "1"}
    environment["FORESHOCK_RING_DIR"] = str(folder / "rings")
    job = subprocess.run(
        [*command, "--result", str(result), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if job.returncode != 0:
        sys.exit(f"the measurement failed:\n{job.stdout}{job.stderr}")
    answer: dict[str, Any] = json.loads(result.read_text())
    return answer


def bootstrap(ratios: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """95 % confidence interval of the median, by the percentile bootstrap over launches, then over their rounds.

    ratios: [launches, rounds].
    """
    random = np.random.default_rng(0)
    launches, rounds = ratios.shape
    chosen = random.integers(launches, size=(4000, launches))[:, :, None]
    draws = ratios[chosen, random.integers(rounds, size=(4000, launches, rounds))]
    low, high = np.percentile(np.median(draws.reshape(4000, -1), axis=1), [2.5, 97.5])
    return float(low), float(high)


def groups(ranks: int, millions: float, variants: Sequence[str], *, views: bool) -> Iterator[list[str]]:
    """Variants whose models fit into memory together, `stock_clip` among each."""
    room = max(1, int(MEMORY_BYTES / (ranks * millions * 1e6 * (16 if views else 20))) - 1)
    others = [variant for variant in variants if variant != "stock_clip"]
    for first in range(0, max(1, len(others)), room):
        yield ["stock_clip", *others[first : first + room]]


def compare(
    ranks: int, millions: float, clipping: str, *, rounds: int, variants: Sequence[str], views: bool
) -> Iterator[dict[str, Any]]:
    """One table row per variant. rounds: of each launch."""
    with tempfile.TemporaryDirectory() as name, collecting(Path(name)) as (grpc, http):
        folder = Path(name)
        shape = ["--parameters", str(millions), "--clipping", clipping, *(["--bucket-views"] if views else [])]
        ratios: dict[str, Any] = {}
        for together in groups(ranks, millions, variants, views=views):
            timed = []
            for number in range(LAUNCHES):
                progress(f"{', '.join(together)}: launch {number + 1} of {LAUNCHES}")
                which = ("--launch", str(number), "--rounds", str(rounds), "--variants", *together)
                timed.append(launch(folder, grpc, ranks, *shape, *which)["seconds"])
            seconds = {v: np.array([[row[v] for row in each] for each in timed]) for v in together}
            ratios |= {v: seconds[v] / seconds["stock_clip"] for v in together}
        check_stored(http, LAUNCHES * (WARM_UP_ROUNDS + rounds), [v for v in VARIANTS[3:] if v in variants])
        for variant in variants:
            alone = launch(folder, grpc, ranks, *shape, "--rounds", "1", "--variants", variant)
            yield {
                "variant": variant,
                "ranks": ranks,
                "parameters": int(millions * 1e6),
                "clipping": clipping,
                "bucket_views": views,
                "ratio_to_stock_clip": float(np.median(ratios[variant])),
                "ci95": list(bootstrap(ratios[variant])),
                "peak_rss_bytes": alone["peak_rss_bytes"],
            }


@contextmanager
def collecting(folder: Path) -> Iterator[tuple[str, str]]:
    """A collector for as long as the block lasts: its gRPC address and its URL."""
    ready = folder / "ready.json"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "foreshock_collector", "--grpc-port=0", "--http-port=0"),
            *(f"--database={folder / 'foreshock.db'}", f"--ready-file={ready}"),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + _COLLECTOR_SECONDS
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit("the collector did not start")
            time.sleep(0.05)
        places = json.loads(ready.read_text())
        yield places["grpc"], places["http"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def progress(text: str) -> None:
    """Where somebody watches."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r  {text}\033[K\r")


def check_stored(url: str, steps: int, watched: Sequence[str]) -> None:
    """A cost without the work done would be no cost: every step of every watched variant has been stored."""
    deadline = time.monotonic() + _COLLECTOR_SECONDS
    while True:
        with urllib.request.urlopen(f"{url}/api/v1/runs", timeout=10) as response:
            runs = json.load(response)["runs"]
        counts = {}
        for run in runs:
            with urllib.request.urlopen(f"{url}/api/v1/runs/{run['run']}", timeout=10) as response:
                counts[run["run"]] = json.load(response)["counters"]["steps"]
        if counts == dict.fromkeys(watched, steps):
            return
        if time.monotonic() > deadline:
            sys.exit(f"{steps} steps were taken, stored were {counts}")
        time.sleep(0.2)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, nargs="+", default=[1.0, 25.0, 100.0], help="in millions")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clipping", choices=list(MAX_NORM), nargs="+", default=list(MAX_NORM))
    parser.add_argument("--rounds", type=int, help=f"of each of {LAUNCHES} launches; default by size")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS), help="with stock_clip")
    parser.add_argument("--bucket-views", action="store_true", help="DDP with gradient_as_bucket_view=True")
    parser.add_argument("--json", action="store_true", help="one object with all results")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    parser.add_argument("--launch", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result:
        measure(options)
        return
    if "stock_clip" not in options.variants:
        parser.error("--variants: stock_clip must be among them: all others are divided by it")
    results = []
    for ranks in options.ranks:
        for millions in options.parameters:
            for clipping in options.clipping:
                if not options.json:
                    print(f"\n{ranks} rank(s), {millions:g} M parameters, clipping {clipping}", flush=True)
                rounds = options.rounds or next((n for most, n in ROUNDS.items() if millions <= most), FEWEST_ROUNDS)
                how = {"rounds": rounds, "variants": options.variants, "views": options.bucket_views}
                for row in compare(ranks, millions, clipping, **how):
                    results.append(row)
                    if not options.json:
                        low, high = row["ci95"]
                        memory = row["peak_rss_bytes"] / 2**20
                        ratio = row["ratio_to_stock_clip"]
                        print(f"  {row['variant']:<28}{ratio:6.3f}  [{low:.3f}, {high:.3f}]  {memory:6.0f} MiB")
    if options.json:
        print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
