"""Logs of trainings that were never run, as `foreshock diagnose` reads them."""

from __future__ import annotations

import math
import random
from pathlib import Path

Log = list[tuple[int, float, float]]
"""Step, loss, gradient norm."""


def healthy(count: int = 120) -> Log:
    rng = random.Random(0)
    return [(i, 3 * 0.99**i + 0.01 * rng.random(), math.exp(rng.gauss(0, 0.1))) for i in range(count)]


def explosion() -> Log:
    calm = healthy()
    climb = [(120 + i, 1.0 + i, 4.0 ** (i + 1)) for i in range(6)]
    return [*calm, *climb, (126, math.nan, math.nan), (127, math.nan, math.nan)]


def csv(folder: Path, log: Log) -> Path:
    path = folder / "log.csv"
    path.write_text("step,loss,grad_norm,lr\n" + "".join(f"{s},{loss},{norm},0.1\n" for s, loss, norm in log))
    return path
