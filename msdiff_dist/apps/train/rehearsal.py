"""A rehearsal of a run: what its ranks say to each other in a step, on any number of ranks, found on one machine.

A rank is rehearsed alone, in a process group that communicates with nobody: real engines of the whole size, router,
step. Ranks that hold the same stages run the same code on the same shapes of weights, so of these only the first and
the last are rehearsed, which own the first and the last ranges of the sharded weights. Collectives do not depend on the
samples' size or on how many a rank has, except for the exchange that routes them: that one is of the true samples, and
the network then computes one small sample of each stage.

A run whose stages change is rehearsed in each of its phases, which begin with engines and groups of their own.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from msdiff_dist.apps.train.local import PRELOAD
from msdiff_dist.apps.train.plan import RunPlan, plan_phases
from msdiff_dist.apps.train.rehearsal_report import RehearsedRank, report, run_report
from msdiff_dist.distributed.placement import Placement
from msdiff_dist.distributed.precision import expected_precision
from msdiff_dist.distributed.spawn import run_ranks
from msdiff_dist.recipe import Recipe, recipe_from, recipe_mapping

_PROCESSES = 2  # ranks rehearsed at a time: each holds the weights of its parts


def rehearse(recipe: Recipe, world_size: int, ranks_per_node: int | None, on_gpus: bool) -> dict[str, Any]:
    """Rehearse `recipe` on `world_size` ranks; the report as JSON values, that of `run_report`.

    Raises:
        UserError: the recipe cannot be placed on so many ranks in one of its phases.
    """
    precision = expected_precision(recipe.train.precision, on_gpus)
    recipe = replace(recipe, train=replace(recipe.train, precision=precision))
    planned = plan_phases(recipe, world_size, ranks_per_node)
    ranks = [(p, rank) for p, (_, plan) in enumerate(planned) for rank in ranks_to_rehearse(plan.placement)]
    processes = min(_PROCESSES, len(ranks), len(os.sched_getaffinity(0)))
    phases = [(recipe_mapping(phase.recipe), plan) for phase, plan in planned]
    parts = run_ranks(
        _rehearse_each, processes, phases, ranks, processes, preload=PRELOAD,
        # Fake collectives are of CPU tensors, also where there is a GPU.
        env={"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    done = sorted(itertools.chain(*parts), key=lambda one: (one[0], one[1].rank))
    reports = [report(world_size, [one for of, one in done if of == p]) for p in range(len(planned))]
    whole = next(p for p, (phase, _) in enumerate(planned) if phase.recipe == recipe)
    return run_report([phase for phase, _ in planned], reports, whole)


def ranks_to_rehearse(placement: Placement) -> list[int]:
    """The first and the last of the ranks that hold the same stages, for all sets of stages."""
    first, last = dict[tuple[int, ...], int](), dict[tuple[int, ...], int]()
    for rank, held in enumerate(placement.stages_of_rank):
        first.setdefault(held, rank)
        last[held] = rank
    return sorted({*first.values(), *last.values()})


def _rehearse_each(
    process: int, phases: Sequence[tuple[dict[str, Any], RunPlan]], ranks: Sequence[tuple[int, int]], processes: int
) -> list[tuple[int, RehearsedRank]]:
    """Body of one process: every `processes`-th of the (phase, rank) in `ranks`, with the phase."""
    import torch

    # Here, because the command itself needs none of the heavy libraries, and DeepSpeed prints when it is imported.
    from msdiff_dist.apps.train.rehearsed_rank import rehearse_rank

    torch.set_num_threads(1)
    return [(p, rehearse_rank(recipe_from(phases[p][0]), phases[p][1], rank)) for p, rank in ranks[process::processes]]
