"""The probe fails inside a sharded training, on one rank: each call of ours once. Each rank runs it."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import foreshock
from foreshock._measure import weights
from tests.agent.scenarios.faults import CLOSE_LOOK, Site, dropped, of_rank_1, site_of
from tests.agent.scenarios.sharded import MAX_NORM, make_model
from tests.agent.scenarios.training import active, apart, batches, loss_of, main


def shards(model: nn.Module) -> list[Tensor]:
    parameters: list[Any] = list(model.parameters())
    local = [parameter.to_local().detach().clone() for parameter in parameters]
    return [shard for shard in local if shard.numel()]


def optimizer_of(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """Update in proportion to the gradient, more or less: fused SGD takes no shards."""
    if fused:
        return torch.optim.AdamW(model.parameters(), lr=0.1, eps=1.0, fused=True)
    return torch.optim.SGD(model.parameters(), lr=0.01)


class Beside:
    """A watched training, step by step beside a stock one that it starts each step from."""

    def __init__(self, *, fused: bool) -> None:
        self.stock, self.ours = make_model(), make_model()
        self._stock_optimizer, self._optimizer = optimizer_of(self.stock, fused), optimizer_of(self.ours, fused)
        self.watch = active(foreshock.attach(self.ours, self._optimizer, clip=MAX_NORM, skip=fused))
        self._data, self._copy = batches(), batches()
        self.steps = 0

    def step(self, profile: Any = None) -> float:
        """How far ours is from stock. profile: on ours alone."""
        self.stock.zero_grad()
        loss_of(self.stock, self._data).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.stock.parameters(), MAX_NORM)
        self._stock_optimizer.step()
        self.ours.zero_grad()
        sys.setprofile(profile)
        loss = loss_of(self.ours, self._copy)
        self.watch.observe(loss=loss, step=self.steps)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        sys.setprofile(None)
        self.steps += 1
        far = apart(shards(self.stock), shards(self.ours))
        self.ours.load_state_dict(self.stock.state_dict())
        return far


def everywhere() -> dict[str, Any]:
    """Each call of ours by ours that a step makes fails once, on rank 1, in a training that goes on."""
    weights.EVERY_STEPS = weights.NORMS_EVERY_STEPS_IF_SMALL = CLOSE_LOOK
    tried: dict[Site, None] = {}
    wrong: list[str] = []
    for fused in (True, False):
        pair = Beside(fused=fused)
        # The first steps do more.
        for _ in range(3):
            pair.step()
        sites: dict[Site, None] = {}

        def find(frame: FrameType, event: str, _: Any, sites: dict[Site, None] = sites) -> None:
            if (site := site_of(frame, event)) is not None:
                sites[site] = None

        for _ in range(CLOSE_LOOK):
            pair.step(find)
        for site in of_rank_1([site for site in sites if site not in tried]):
            # What it leaves behind, the step for the next site shows.
            wrong += fails(site, pair)
        tried |= sites
        pair.watch.detach()
    return {"wrong": wrong, "called": sorted({callee for _, _, callee in tried})}


def fails(site: Site, pair: Beside) -> list[str]:
    """What is wrong if one call fails on rank 1."""
    fired = False

    def fail(frame: FrameType, event: str, _: Any) -> None:
        nonlocal fired
        if not fired and site_of(frame, event) == site:
            fired = True
            raise KeyError("a bug of ours")

    before = dropped(pair.watch)
    far = pair.step(fail if dist.get_rank() == 1 else None)
    drops = dropped(pair.watch) - before
    if far <= 1e-5 and drops == int(fired) and fired == (dist.get_rank() == 1):
        return []
    return [f"{site}: {far:.2g} from stock, {drops} drops, fired: {fired}"]


if __name__ == "__main__":
    main({"everywhere": everywhere})
