"""The memory that `msdiff plan` predicts for every rank, beside what training on CPU ranks of this machine takes.

Trains a recipe on synthetic samples for a few steps. Measured: the most resident memory of each rank, less what it had
after a step of a small model, when libraries are loaded and process groups joined. A glibc setting makes every tensor
of 64 kB or more a mapping of its own, which is given back when it is freed: else what malloc keeps would be counted.

    python tools/bench_memory.py recipes/fashion_mnist_3stage.yaml train.global_batch_size=512 --ranks 4
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from msdiff_dist.apps.train.prediction import predict
from msdiff_dist.apps.train.trainer import Trainer
from msdiff_dist.data.config import DataConfig
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.distributed.plan_report import size
from msdiff_dist.distributed.precision import expected_precision
from msdiff_dist.models.autoencoder import AutoencoderConfig
from msdiff_dist.recipe import Recipe, load_recipe, recipe_from, recipe_mapping
from msdiff_dist.testing import run_distributed
from msdiff_dist.training.run_folder import RunFolder

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024), "MALLOC_MMAP_MAX_": str(2**30), "MALLOC_ARENA_MAX": "1"}


def on_synthetic_samples(recipe: Recipe, ranks: int) -> Recipe:
    """The recipe without files: samples are drawn, and nothing is saved or previewed."""
    old = recipe.data
    data = DataConfig(
        kind="synthetic",
        lanes=ranks,
        latent_shape=recipe.latent_shape,
        num_classes=old.num_classes,
        context_shape=old.context_shape,
    )
    return dataclasses.replace(
        recipe,
        data=data,
        autoencoder=AutoencoderConfig(),
        text_encoder=None,
        preview=dataclasses.replace(recipe.preview, every=0),
        train=dataclasses.replace(recipe.train, precision=expected_precision(recipe.train.precision, False)),
    )


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most so far) of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def measure(rank: int, mapping: dict[str, Any], steps: int, folder: Path) -> int:
    """Body of one rank: bytes by which its memory has grown at the most."""
    recipe = recipe_from(mapping)
    # What the libraries import and allocate at their first use belongs to the baseline: a small model is trained first.
    small = recipe.model.small(8, recipe.model.context_channels or 8)
    train(dataclasses.replace(recipe, model=small), rank, 1, folder / "small")
    Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM anew
    before = resident("VmRSS")
    train(recipe, rank, steps, folder / "run")
    return resident("VmHWM") - before


def train(recipe: Recipe, rank: int, steps: int, folder: Path) -> None:
    env = Environment(rank=rank, local_rank=rank, world_size=dist.get_world_size(), device=torch.device("cpu"))
    run = Trainer(recipe, RunFolder(folder), env)
    for _ in range(steps):
        run.step(recipe.optimizer.lr)
    run.feed.close()
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, as key=value")
    args = parser.parse_intermixed_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})  # malloc reads it at its start
    recipe = on_synthetic_samples(load_recipe(args.recipe, args.overrides), args.ranks)
    predicted = predict(recipe, args.ranks, on_gpus=False)
    with tempfile.TemporaryDirectory() as folder:
        measured = run_distributed(measure, args.ranks, recipe_mapping(recipe), args.steps, Path(folder), timeout=1200)
    title = f"{recipe.name}, {recipe.train.precision}, on {args.ranks} ranks"
    columns = ["weights", "gradients", "optimizer", "averages", "activations", "buffers", "total"]
    table = Table("rank", *columns, "measured", "ratio", title=title)
    for rank, grown in zip(predicted["ranks"], measured, strict=True):
        peak = rank["peak_bytes"]
        table.add_row(str(rank["rank"]), *(size(peak[c]) for c in columns), size(grown), f"{peak['total'] / grown:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
