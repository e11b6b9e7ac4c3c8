"""A rehearsal of a run: what its ranks say to each other in a step, on any number of ranks, found on one machine.

A rank is rehearsed alone, in a process group that communicates with nobody: real engines of the whole size, router,
step. Ranks that hold the same stages run the same code on the same shapes of weights, so of these only the first and
the last are rehearsed, which own the first and the last ranges of the sharded weights. Collectives do not depend on the
samples' size or on how many a rank has, except for the exchange that routes them: that one is of the true samples, and
the network then computes one small sample of each stage.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from msdiff_dist.apps.train.local import PRELOAD
from msdiff_dist.apps.train.plan import RunPlan, plan_run
from msdiff_dist.apps.train.rehearsal_report import RehearsedRank, report
from msdiff_dist.distributed.placement import Placement
from msdiff_dist.distributed.precision import expected_precision
from msdiff_dist.distributed.spawn import run_ranks
from msdiff_dist.recipe import Recipe, recipe_from, recipe_mapping

_PROCESSES = 2  # ranks rehearsed at a time: each holds the weights of its parts


def rehearse(recipe: Recipe, world_size: int, ranks_per_node: int | None, on_gpus: bool) -> dict[str, Any]:
    """Rehearse `recipe` on `world_size` ranks; the report as JSON values.

    Raises:
        UserError: the recipe cannot be placed on so many ranks.
    """
    precision = expected_precision(recipe.train.precision, on_gpus)
    recipe = replace(recipe, train=replace(recipe.train, precision=precision))
    plan = plan_run(recipe, world_size, ranks_per_node)
    ranks = ranks_to_rehearse(plan.placement)
    processes = min(_PROCESSES, len(ranks), len(os.sched_getaffinity(0)))
    parts = run_ranks(
        _rehearse_each, processes, recipe_mapping(recipe), plan, ranks, processes, preload=PRELOAD,
        # Fake collectives are of CPU tensors, also where there is a GPU.
        env={"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    return report(world_size, sorted(itertools.chain(*parts), key=lambda one: one.rank))


def ranks_to_rehearse(placement: Placement) -> list[int]:
    """The first and the last of the ranks that hold the same stages, for all sets of stages."""
    first, last = dict[tuple[int, ...], int](), dict[tuple[int, ...], int]()
    for rank, held in enumerate(placement.stages_of_rank):
        first.setdefault(held, rank)
        last[held] = rank
    return sorted({*first.values(), *last.values()})


def _rehearse_each(
    process: int, recipe: dict[str, Any], plan: RunPlan, ranks: Sequence[int], processes: int
) -> list[RehearsedRank]:
    """Body of one process: every `processes`-th of the ranks."""
    import torch

    # Here, because the command itself needs none of the heavy libraries, and DeepSpeed prints when it is imported.
    from msdiff_dist.apps.train.rehearsed_rank import rehearse_rank

    torch.set_num_threads(1)
    return [rehearse_rank(recipe_from(recipe), plan, rank) for rank in ranks[process::processes]]
