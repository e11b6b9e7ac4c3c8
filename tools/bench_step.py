"""How much longer a training step takes than the forward and backward passes in it, on gloo ranks of this machine.

Two sides alternate in the same processes: the whole step as `msdiff train` takes it (feed, routing, preparation,
engines, optimizers, averages), and the bare one, which is forward, loss and backward of the same model on the same
samples, as plain modules without groups and without an optimizer. A step is timed on all ranks together, from barrier
to barrier. Both compute in fp32 unless an override says otherwise. Printed are medians, the share of the overhead in
the step, and where it goes on rank 0.

    python tools/bench_step.py recipes/fashion_mnist_3stage.yaml --nproc 2 data.shards=data/fashion-mnist
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from msdiff_dist.apps.train.trainer import Trainer
from msdiff_dist.diffusion.objective import Objective
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.models.multistage_unet import build_parts
from msdiff_dist.recipe import Recipe, load_recipe, recipe_from, recipe_mapping
from msdiff_dist.testing import run_distributed
from msdiff_dist.training.feed import MicroBatch
from msdiff_dist.training.metrics import StepOutcome
from msdiff_dist.training.prepare import PreparedBatch
from msdiff_dist.training.run_folder import RunFolder

WARM_UP = 3  # steps of each side before the first that counts


class Whole:
    """The step of a run, and how long its preparation takes."""

    def __init__(self, recipe: Recipe, rank: int, world_size: int, folder: Path) -> None:
        env = Environment(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
        self.run = Trainer(recipe, RunFolder(folder), env)
        self.seconds = 0.0  # of preparation in the last step
        self.prepared: list[tuple[MicroBatch, PreparedBatch]] = []  # of the last step
        self._prepare = self.run.prepare
        self.run.train_step._prepare = self._timed  # type: ignore[assignment]

    def step(self) -> StepOutcome:
        self.seconds = 0.0
        self.prepared.clear()
        return self.run.step(self.run.recipe.optimizer.lr)

    def _timed(self, micro: MicroBatch) -> PreparedBatch:
        start = time.perf_counter()
        batch = self._prepare(micro)
        self.seconds += time.perf_counter() - start
        self.prepared.append((micro, batch))
        return batch


class Bare:
    """Forward, loss and backward of this rank's part of the model, as plain modules."""

    def __init__(self, recipe: Recipe, held: tuple[int, ...]) -> None:
        dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
        self.shared, self.stages = build_parts(recipe.model, held, recipe.train.seed)
        for part in (self.shared, *self.stages.values()):
            part.to(dtype)
        self.objective = Objective(recipe.process(), recipe.train.loss)

    def step(self, prepared: list[tuple[MicroBatch, PreparedBatch]]) -> None:
        for micro, batch in prepared:
            features = self.shared(*batch.inputs)
            losses = [
                self.objective.losses(stage(*(f[micro.rows[k]] for f in features)), batch.noised, micro.rows[k]).sum()
                for k, stage in self.stages.items()
            ]
            torch.stack(losses).sum().backward()
        for part in (self.shared, *self.stages.values()):
            part.zero_grad(set_to_none=True)


def timed(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, seconds of this rank alone, seconds until all ranks are done)."""
    dist.barrier()
    start = time.perf_counter()
    result = action()
    own = time.perf_counter() - start
    dist.barrier()
    return result, own, time.perf_counter() - start


def measure(rank: int, mapping: dict[str, Any], steps: int, folder: Path) -> dict[str, float]:
    """Body of one rank: median seconds, by name."""
    recipe, world_size = recipe_from(mapping), dist.get_world_size()
    whole = Whole(recipe, rank, world_size, folder)
    bare = Bare(recipe, whole.run.placement.stages_of_rank[rank])
    rows: list[dict[str, float]] = []
    for _ in range(steps + WARM_UP):
        outcome, own, all_ranks = timed(whole.step)
        _, bare_own, bare_all = timed(lambda: bare.step(whole.prepared))
        seconds = outcome.seconds
        row = {
            "step": all_ranks,
            "bare": bare_all,
            "waiting for data": seconds["data"],
            "routing": seconds["routing"],
            "preparation": whole.seconds,
            "engines beyond forward and backward": seconds["compute"] - whole.seconds - bare_own,
            "agreement and optimizers": seconds["optimizer"],
            "averages and the rest": own - sum(seconds.values()),
        }
        rows.append(row)
    whole.run.feed.close()
    return {name: statistics.median(row[name] for row in rows[WARM_UP:]) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, as key=value")
    args = parser.parse_intermixed_args()
    recipe = load_recipe(args.recipe, ["train.precision=fp32", *args.overrides])
    with tempfile.TemporaryDirectory() as folder:
        of_rank = run_distributed(
            measure, args.nproc, recipe_mapping(recipe), args.steps, Path(folder) / "run", timeout=1200
        )
    first = of_rank[0]
    overhead = {"ranks": args.nproc, "overhead": 1 - first["bare"] / first["step"]}
    if args.json:
        print(json.dumps(overhead | first))
        return
    table = Table("", "ms", "share of the step", title=f"{recipe.name} on {args.nproc} gloo ranks")
    for name, seconds in first.items():
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{seconds / first['step']:.1%}")
    table.add_row("overhead", f"{(first['step'] - first['bare']) * 1e3:.2f}", f"{overhead['overhead']:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
