"""What the norms of weights, updates and moments cost a step: CPU time of both, in one process and one thread.

CPU time and not wall time, since other processes then disturb less. The step is that of benchmarks/step.py on one rank,
without DDP: forward, backward, stock clipping, fused AdamW. Beside the time it counts what is read, since that bounds
the cost on any machine: bytes of the memory lines that a look touches, over those that AdamW's step reads and writes.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from foreshock._arithmetic.arithmetic import arithmetic_for
from foreshock._arithmetic.parameters import plan_parameters
from foreshock._measure.samples import SAMPLES
from foreshock._measure.weights import EVERY_STEPS, Weights

LAYERS, BATCH = 8, 8
ROUNDS = {1.0: 500, 6.0: 120, 25.0: 60}
"""Steps, by millions of parameters."""
LINE_BYTES, ADAMW_BYTES = 64, 28
"""Of a memory line; of weight, gradient and both moments in float32, read, and all but the gradient, written."""


def measure(millions: float, rounds: int) -> str:
    """Return a line of the table."""
    width = int((millions * 1e6 / LAYERS) ** 0.5)
    modules: list[nn.Module] = []
    for _ in range(LAYERS):
        modules += [nn.Linear(width, width), nn.Tanh()]
    model = nn.Sequential(*modules)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    plan = plan_parameters(model, optimizer)
    weights = Weights(plan, optimizer, arithmetic_for(plan.device()))
    x = torch.randn(BATCH, width)
    looks: dict[str, list[float]] = {"norms": [], "samples": [], "nothing": []}
    steps = []
    for sequence in range(2, rounds + 2):
        began = time.thread_time()
        optimizer.zero_grad(set_to_none=False)
        (model(x) - 1).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        computed = time.thread_time()
        weights.measure_due(sequence)
        looked = time.thread_time()
        optimizer.step()
        steps.append(time.thread_time() - looked + computed - began)
        place = sequence % weights.every
        # Every hundredth step takes the fingerprint as well.
        if sequence % EVERY_STEPS != 1:
            looks["samples" if place == 0 else "norms" if place == 1 else "nothing"].append(looked - computed)
    norms, samples, nothing = (statistics.median(looks[kind]) for kind in ("norms", "samples", "nothing"))
    per_step = (norms + samples + (weights.every - 2) * nothing) / weights.every
    step = statistics.median(steps)
    sizes = [p.numel() for p in model.parameters()]
    lines = sum(min(SAMPLES, size, -(-4 * size // LINE_BYTES)) for size in sizes)
    # Weights twice, and each moment once.
    read = 4 * lines * LINE_BYTES / weights.every
    cells = (
        f"{millions:g} M",
        f"{weights.every}",
        f"{1e6 * norms:.0f}",
        f"{1e6 * samples:.0f}",
        f"{1e6 * nothing:.0f}",
        f"{1e3 * step:.1f}",
        f"{100 * per_step / step:.2f} %",
        f"{100 * read / (ADAMW_BYTES * sum(sizes)):.3f} %",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table of docs/benchmarks."""
    torch.set_num_threads(1)
    head = ("parameters", "every", "norms, µs", "samples, µs", "nothing due, µs", "step, ms", "of a step", "bytes")
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for millions, rounds in ROUNDS.items():
        print(measure(millions, rounds), flush=True)


if __name__ == "__main__":
    main()
