"""The process groups of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from msdiff_dist.distributed.agree import combined

SHARED, ROUTING = "shared", "routing"
"""What to call the groups of all ranks."""


@dataclass(frozen=True)
class Groups:
    """The process groups of this rank beside the default one, which is that of the shared part and of agreements.

    Attributes:
        stage: for each stage that this rank holds, the group of the ranks that hold it.
        routing: all ranks, in a group apart from the default one, so that the exchange of the next micro batch never
            waits behind a gradient reduction.
    """

    stage: Mapping[int, dist.ProcessGroup]
    routing: dist.ProcessGroup

    def named(self) -> dict[str, dist.ProcessGroup]:
        """All groups of this rank by what to call them."""
        named = {f"stage {k}": group for k, group in self.stage.items()}
        return named | {SHARED: all_ranks(), ROUTING: self.routing}

    def close(self) -> None:
        """Give back the groups, which nobody uses any more. Collective."""
        combined(None, lambda _: None)  # a rank that left early would close what another still reads from
        for group in (*self.stage.values(), self.routing):
            dist.destroy_process_group(group)


def all_ranks() -> dist.ProcessGroup:
    """The default group, of all ranks."""
    return dist.distributed_c10d._get_default_group()


def make_groups(stages_of_rank: Sequence[Sequence[int]], rank: int) -> Groups:
    """A group for each stage that a rank holds, and one for routing: as many as there are stages, however many ranks.

    Collective: `new_group` is called on every rank for every group, in the same order, whether or not the rank is in
    it. There it returns at once. (With `use_local_synchronization` other ranks need not call it. But torch then names a
    group by how many groups the rank has made before, and two members that hold different stages would wait for each
    other under different names.)

    Args:
        stages_of_rank: the stages that each rank holds, the same on every rank.
    """
    num_stages = 1 + max(k for held in stages_of_rank for k in held)
    holders = [[r for r, held in enumerate(stages_of_rank) if k in held] for k in range(num_stages)]
    stage: list[Any] = [dist.new_group(ranks) if ranks else None for ranks in holders]
    routing: Any = dist.new_group(list(range(len(stages_of_rank))))
    return Groups({k: stage[k] for k in stages_of_rank[rank]}, routing)
