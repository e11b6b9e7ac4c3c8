"""Whole networks trained together, beside training one after the other, on the same gloo ranks of this machine.

Together: the recipe as it is, each network on its own ranks. One after the other: every network alone on all ranks, as
a unified model on as many samples as its stage has. The steps alternate, so that both sides meet the same machine.
Printed: seconds of a step of each, the sum of those alone, and the ratio of the two ways.

    python tools/bench_separate.py --ranks 4
    python tools/bench_separate.py --ranks 4 --recipe recipe.yaml --steps 20 train.global_batch_size=64
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from rich.table import Table

from msdiff_dist.apps.train.plan import plan_run
from msdiff_dist.apps.train.trainer import Trainer
from msdiff_dist.data.config import DataConfig
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.recipe import Recipe, load_recipe, recipe_from, recipe_mapping
from msdiff_dist.testing import run_distributed
from msdiff_dist.training.phases import TrainedStagesConfig
from msdiff_dist.training.run_folder import RunFolder

# Two networks of different sizes; 94 % of the samples are below timestep 875.
SMALL: dict[str, Any] = {
    "name": "two_networks",
    "data": {"kind": "synthetic", "lanes": 48, "latent_shape": [4, 16, 16]},
    "stages": {"boundaries": [875], "sampling": [94, 6]},
    "model": {
        "family": "separate",
        "networks": [
            {
                "encoder_channels": 64, "decoder_channels": [64], "channel_mult": [1, 2, 2], "in_channels": 4,
                "out_channels": 4, "attention_downsamples": [4], "num_head_channels": 32,
            },
            {
                "encoder_channels": 32, "decoder_channels": [32], "channel_mult": [1, 2], "in_channels": 4,
                "out_channels": 4, "attention_downsamples": [2], "num_head_channels": 32, "num_res_blocks": 1,
            },
        ],
    },
    "optimizer": {"lr": 1e-4},
    "train": {"steps": 1000, "global_batch_size": 100, "precision": "fp32"},
}  # fmt: skip


def on_random_numbers(recipe: Recipe) -> Recipe:
    """The recipe on synthetic samples of its latents' shape, from first weights, without saving or previews."""
    data = DataConfig(
        kind="synthetic",
        lanes=recipe.data.lanes,
        latent_shape=recipe.latent_shape,
        num_classes=recipe.data.num_classes,
        context_shape=recipe.data.context_shape,
    )
    return replace(
        recipe,
        data=data,
        text_encoder=None,
        train=replace(recipe.train, init_from=None),
        checkpoint=replace(recipe.checkpoint, every=0),
        preview=replace(recipe.preview, every=0),
    )


def alone(recipe: Recipe, stage: int, samples: int) -> Recipe:
    """The network of one stage as a unified model, on as many samples."""
    return replace(
        recipe,
        name=f"{recipe.name}_{stage}",
        model=recipe.model.of_stages([stage]),
        stages=TrainedStagesConfig(),
        train=replace(recipe.train, global_batch_size=samples, micro_batch_size=None),
        parallel=replace(recipe.parallel, placement="auto"),
    )


def measure(rank: int, mappings: list[dict[str, Any]], steps: int, folder: Path) -> list[float]:
    """Body of one rank: median seconds of a step of each recipe, after two steps before."""
    environment = Environment(rank=rank, local_rank=rank, world_size=dist.get_world_size(), device=torch.device("cpu"))
    recipes = [recipe_from(mapping) for mapping in mappings]
    runs = [Trainer(recipe, RunFolder(folder / recipe.name), environment) for recipe in recipes]
    seconds: list[list[float]] = [[] for _ in runs]
    for step in range(steps + 2):
        for run, recipe, taken in zip(runs, recipes, seconds, strict=True):
            dist.barrier()  # no rank begins the next run while another is in this one
            start = time.perf_counter()
            run.step(recipe.optimizer.lr)
            dist.barrier()
            if step >= 2:
                taken.append(time.perf_counter() - start)
    for run in runs:
        run.feed.close()
    return [statistics.median(taken) for taken in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="a recipe whose stages are whole networks; default: a small one")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, as key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.recipe is None:
            args.recipe = Path(folder) / "recipe.yaml"
            args.recipe.write_text(yaml.safe_dump(SMALL))
        joint = on_random_numbers(load_recipe(args.recipe, args.overrides))
        if joint.model.share_encoder:
            parser.error("the recipe's stages share an encoder: they are no whole networks")
        plan = plan_run(joint, args.ranks)
        quotas = plan.quotas.quotas_K.tolist()
        recipes = [joint, *(alone(joint, k, quota) for k, quota in enumerate(quotas))]
        mappings = [recipe_mapping(recipe) for recipe in recipes]
        together, *one_by_one = run_distributed(measure, args.ranks, mappings, args.steps, Path(folder), timeout=1200)[
            0
        ]
    stages = [list(held) for held in plan.placement.stages_of_rank]
    table = Table("", "samples", "seconds a step", title=f"{joint.name} on {args.ranks} gloo ranks, stages {stages}")
    for k, (quota, taken) in enumerate(zip(quotas, one_by_one, strict=True)):
        table.add_row(f"network {k} alone, on all ranks", str(quota), f"{taken:.3g}")
    table.add_row("one after the other", str(sum(quotas)), f"{sum(one_by_one):.3g}")
    table.add_row("together", str(sum(quotas)), f"{together:.3g}")
    table.add_row("ratio", "", f"{together / sum(one_by_one):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
