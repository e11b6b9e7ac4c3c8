"""The content of the first global batches of a recipe, as this process would train on them.

Recorded exactly, by value or by BLAKE2b digest of the bytes: sample keys, labels, stages, micro batches, discrete
times, noise, dropped conditions, mirrored augmentations, images, stored latents and contexts. Those are integers,
stored bytes and draws of numpy, the same on every CPU. Numbers that pass through exp, sin, ndtri or an interpolation
are not: continuous times are recorded as numbers, and posterior samples, descriptions of augmentations and augmented
images by `projected`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from msdiff_dist.apps.train.plan import plan_run
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.diffusion.augmentation import draw_transforms, transformed
from msdiff_dist.distributed.router import Router
from msdiff_dist.pixels import to_model_range
from msdiff_dist.recipe import Recipe
from msdiff_dist.training.draws import Drawing
from msdiff_dist.training.feed import Feed, MicroBatch
from tests.golden.cases import BATCH, recipe_of

BATCHES = 3


def batches_record(case: str, folder: Path) -> dict[str, Any]:
    """The record of a case's first batches: `quotas`, `importance` and, for each step, `steps`."""
    recipe = recipe_of(case, folder)
    plan = plan_run(recipe, 1)
    with _alone() as group:
        loader = StepLoader(recipe.data, recipe.train.seed, BATCH)
        accumulation = recipe.train.gradient_accumulation_steps
        router = Router(group, plan.placement, 0, torch.device("cpu"))
        seed = recipe.train.seed
        dropout = recipe.train.condition_dropout
        drawing = Drawing(seed=seed, shape=recipe.latent_shape, condition_dropout=dropout)
        feed = Feed(loader, plan.batches, router, drawing, seed=seed, accumulation=accumulation, start_batch=0)
        steps = []
        for _ in range(BATCHES):
            step = list(feed.next_batch())
            keys = feed.keys_of(step[0].batch, range(BATCH))
            steps.append(_step_record(recipe, step, [keys[i] for i in range(BATCH)]))
        feed.close()
    return {
        "quotas": plan.quotas.quotas_K.tolist(),
        "importance": plan.quotas.importance_K.tolist(),
        "steps": steps,
    }


def digest(array: np.ndarray | torch.Tensor) -> str:
    """Digest of the exact elements in order, and of their type and shape."""
    array = np.ascontiguousarray(array)
    head = f"{array.dtype.str} {array.shape} ".encode()
    return hashlib.blake2b(head + array.tobytes(), digest_size=16).hexdigest()


def projected(array: np.ndarray | torch.Tensor) -> list[float]:
    """Two numbers that any change of an element, or of the elements' order, changes: a weighted sum, and the norm."""
    flat = np.asarray(array, dtype=np.float64).ravel()
    return [float(flat @ (1 + np.arange(flat.size) / max(flat.size, 1))), float(np.sqrt(flat @ flat))]


def _step_record(recipe: Recipe, micro_batches: list[MicroBatch], keys: list[str]) -> dict[str, Any]:
    """The record of one step, in order of the index in the global batch, whichever micro batch held a sample."""
    seed, step = recipe.train.seed, micro_batches[0].batch
    index_B = np.concatenate([m.samples.index_n for m in micro_batches])
    place_B = index_B.argsort(kind="stable")
    assert index_B[place_B].tolist() == list(range(BATCH)), "every sample is routed once"

    def gathered(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts)[torch.from_numpy(place_B)]

    samples = [m.samples for m in micro_batches]
    x_BCHW, t_B = gathered([s.x_nCHW for s in samples]), gathered([m.drawn.t_n for m in micro_batches]).numpy()
    stage_B = np.concatenate([s.stage_n for s in samples])[place_B]
    micro_B = np.repeat(np.arange(len(samples)), [len(s.index_n) for s in samples])[place_B]
    record: dict[str, Any] = {
        "keys": " ".join(keys),
        "stages": _written(stage_B),
        "micro_batches": _written(micro_B),
        "times": " ".join(map(str, t_B)) if t_B.dtype == np.int64 else t_B.tolist(),
        "noise": digest(gathered([m.drawn.noise_nCHW for m in micro_batches])),
        "x": projected(x_BCHW) if recipe.data.latent_moments else digest(x_BCHW),
    }
    labels, contexts = [s.label_n for s in samples if s.label_n is not None], [s.context_nTC for s in samples]
    if labels:
        record["labels"] = _written(gathered(labels).numpy())
    if contexts[0] is not None:
        record["contexts"] = digest(gathered([c for c in contexts if c is not None]))
    if recipe.train.condition_dropout:
        dropped_B = gathered([m.drawn.dropped_n for m in micro_batches if m.drawn.dropped_n is not None])
        record["dropped"] = _written(dropped_B.int().numpy())
    if recipe.augmentation:
        transforms = draw_transforms(recipe.augmentation, seed, step, np.arange(BATCH))
        description_B, augmented = transforms.label_n, transformed(to_model_range(x_BCHW), transforms)
        record["mirrored"] = _written(description_B[:, 0].int().numpy())
        record["upside_down"] = _written(description_B[:, 1].int().numpy())
        record["augmentation"] = projected(description_B)
        record["augmented"] = projected(augmented)
    return record


def _written(value_B: np.ndarray) -> str:
    return "".join(map(str, value_B.tolist()))


@contextmanager
def _alone() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
