"""The ranks that train a model together."""

from __future__ import annotations

from contextlib import suppress

import torch.distributed as dist
from torch import nn

from foreshock._attach.agreement import Agreement, RankProposal, agree, decide
from foreshock._attach.models import group_of
from foreshock._errors import AttachError
from foreshock._log import rank_zero_info
from foreshock._torch import PrefixStore, default_store


class Ranks:
    """Finds the agreement of those that train the model: its process group, through the job's store, or one process."""

    def __init__(self, model: nn.Module) -> None:
        self._group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self._group = group_of(model)
            self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)

    def agree(
        self, proposal: RankProposal, *, run: str = "", launch: str = "", timeout: float = 0.0, silent: bool = False
    ) -> Agreement:
        """Return the agreement of all ranks. Rank 0 logs why none watches, unless it raises that."""
        if self._group is None:
            agreement = decide([proposal], run=run, launch=launch, timeout=timeout)
        else:
            agreement = agree(
                PrefixStore(f"foreshock/{self._group.group_name}", default_store()),
                rank=self.rank,
                world_size=self.size,
                proposal=proposal,
                run=run,
                launch=launch,
                timeout=timeout,
            )
        if agreement.disabled and not silent:
            rank_zero_info(f"not watching: {agreement.disabled}", rank=self.rank)
        return agreement

    def leave(self, proposal: RankProposal) -> None:
        """Post that this rank does not take part, without waiting."""
        with suppress(AttachError):
            self.agree(proposal, silent=bool(proposal.error))
