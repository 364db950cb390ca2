"""Scenarios of test_step_trace.py: the probe's own calls in one step. Each rank runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import foreshock
from foreshock_recorder import ring
from tests.agent.scenarios.training import batches, loss_of, main, make_model, make_optimizer

PROBE = Path(foreshock.__file__).parent
PARTS = (str(PROBE), str(Path(ring.__file__).parent))
WARM = 4
"""Steps before the one that is traced: the first ones learn, and look closer."""


def _traced(**ddp: Any) -> list[list[str]]:
    """Module and name of each function of the probe that the fifth step calls. The script observes its loss."""
    model = make_model(**ddp)
    optimizer, data = make_optimizer(model, fused=True), batches()
    calls: list[list[str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PARTS):
            module = ".".join(Path(code.co_filename).relative_to(PROBE.parent).with_suffix("").parts)
            calls.append([module.removeprefix("foreshock."), code.co_qualname])

    with foreshock.attach(model, optimizer, clip=0.5) as watch:
        for step in range(WARM + 1):
            optimizer.zero_grad()
            loss = loss_of(model, data)
            sys.setprofile(note if step == WARM else None)
            watch.observe(loss=loss, step=step)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            sys.setprofile(None)
    return calls


def default() -> list[list[str]]:
    return _traced()


def bucket_views() -> list[list[str]]:
    return _traced(gradient_as_bucket_view=True)


if __name__ == "__main__":
    main({"default": default, "bucket_views": bucket_views})
