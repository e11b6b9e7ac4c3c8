"""Stage-parallel training compared with data parallelism, side by side on gloo ranks of this machine.

Data parallelism is torch DDP with every decoder on every rank; rank r trains stage r modulo K. Both sides have the same
model, optimizer and number of samples, in fp32, and their steps alternate. Printed for each rank: bytes of parameters,
gradients and optimizer state; bytes sent in a step, as the loopback device counts them; seconds of a step; ratios.

    python tools/bench_stage_parallel.py --ranks 4
    unshare -n sh -c 'ip link set lo up; python tools/bench_stage_parallel.py'    # nothing else on the loopback device
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from msdiff_dist.apps.train.trainer import Trainer
from msdiff_dist.distributed.agree import Agreement
from msdiff_dist.distributed.engines import ReducedGradients
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.distributed.part_engines import PartEngine
from msdiff_dist.models.multistage_unet import build_model
from msdiff_dist.recipe import Recipe, load_recipe, recipe_from, recipe_mapping
from msdiff_dist.testing import run_distributed
from msdiff_dist.training.optimizer import optimizer_factory
from msdiff_dist.training.run_folder import RunFolder

OVERRIDES = [
    *("data.kind=synthetic", "data.shards=[]", "data.latent_shape=[3,32,32]", "data.lanes=24"),
    *("data.image_size=null", "data.num_classes=null"),
    "model.in_channels=3",
    "model.out_channels=3",
    "model.num_classes=null",
    "train.condition_dropout=0",
    "train.precision=fp32",
    "parallel.zero_shared=2",
    "parallel.zero_decoders=2",
]


@dataclass(frozen=True)
class Side:
    """Figures of one way to train, on one rank.

    state: bytes of parameters, gradients and optimizer state. sent: bytes that all ranks together send in a step.
    seconds: of a step. Both are medians.
    """

    state: int
    sent: float
    seconds: float


class DataParallel:
    """DDP over the whole model; this rank trains one stage."""

    def __init__(self, recipe: Recipe, rank: int, world_size: int) -> None:
        model = build_model(recipe.model, recipe.train.seed)
        self.ddp = DistributedDataParallel(model, find_unused_parameters=True)
        self.optimizer = optimizer_factory(recipe.optimizer, fused=False)(list(model.parameters()))
        self.process, self.stage = recipe.process(), rank % recipe.stages.num_stages
        n = recipe.train.batch_size(world_size) // world_size
        lo, hi = recipe.partition().interval(self.stage)
        self.x0_nCHW = torch.randn(n, *recipe.latent_shape)
        self.t_n = torch.randint(int(lo), int(hi), (n,))
        self.clip = recipe.optimizer.grad_clip
        self.gradient_bytes = 0

    def step(self) -> None:
        """One optimizer step with clipped gradients. Collective."""
        eps_nCHW = torch.randn_like(self.x0_nCHW)
        x_nCHW, time_n = self.process.network_input(self.process.perturb(self.x0_nCHW, eps_nCHW, self.t_n), self.t_n)
        output_nCHW = self.ddp(x_nCHW, time_n, torch.full_like(self.t_n, self.stage))
        self.optimizer.zero_grad()
        (output_nCHW - eps_nCHW).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.ddp.parameters(), self.clip)
        self.gradient_bytes = size(p.grad for p in self.ddp.parameters() if p.grad is not None)
        self.optimizer.step()

    def state_bytes(self) -> int:
        """Bytes of parameters, gradients and optimizer state after a step."""
        moments = (v for s in self.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.ndim)
        return size(self.ddp.parameters()) + self.gradient_bytes + size(moments)


class StageParallel:
    """One rank of a run of this package."""

    def __init__(self, recipe: Recipe, rank: int, world_size: int, folder: Path) -> None:
        self.run = Trainer(
            recipe,
            RunFolder(folder),
            Environment(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu")),
        )
        self.lr = recipe.optimizer.lr
        self.gradient_bytes = 0
        self.reduce = self.run.engines.reduce
        self.run.engines.reduce = self._measured  # type: ignore[method-assign]

    def _measured(self, agreement: Agreement) -> ReducedGradients:
        """Measure the gradients when all of them exist: after the backward passes, before the optimizers."""
        engines = self._engines()
        owned = (g for e in engines for g in e.reduced_gradients())
        whole = (p.grad for e in engines for p in e.module.parameters() if p.grad is not None)
        self.gradient_bytes = size(owned) + size(whole)
        return self.reduce(agreement)

    def _engines(self) -> list[PartEngine]:
        engines = self.run.engines
        return [*engines.stages.values(), *([engines.shared] if engines.shared else [])]

    def step(self) -> None:
        """One optimizer step. Collective."""
        self.run.step(self.lr)

    def state_bytes(self) -> int:
        """Bytes of parameters, gradients and optimizer state after a step."""
        parameters = size(p for e in self._engines() for p in e.module.parameters())
        shards = size(t for s in self.run.state.shards.values() for t in s.flats())
        moments = size(t for s in self.run.state.shards.values() for m in s.moments() for t in m.values())
        return parameters + self.gradient_bytes + shards + moments


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of all elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def loopback_bytes() -> int:
    """Bytes sent through the loopback device so far."""
    # Of the numbers after the name, the first eight are about receiving; the ninth is bytes sent.
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def measure(rank: int, mapping: dict[str, Any], steps: int, folder: Path) -> tuple[Side, Side]:
    """Body of one rank: figures of stage-parallel and data-parallel training over `steps` steps, after two before."""
    recipe, world_size = recipe_from(mapping), dist.get_world_size()
    ours, common = StageParallel(recipe, rank, world_size, folder), DataParallel(recipe, rank, world_size)
    seconds: tuple[list[float], list[float]] = ([], [])
    sent: tuple[list[int], list[int]] = ([], [])
    sides: list[Callable[[], None]] = [ours.step, common.step]
    for i in range(steps + 2):
        for side, step in enumerate(sides):
            # Barriers, so that neither bytes nor seconds of one side are counted for the other.
            dist.barrier()
            bytes_before, start = loopback_bytes(), time.perf_counter()
            step()
            dist.barrier()
            if i >= 2:
                seconds[side].append(time.perf_counter() - start)
                sent[side].append(loopback_bytes() - bytes_before)
    ours.run.feed.close()
    states = ours.state_bytes(), common.state_bytes()
    return tuple(Side(states[i], statistics.median(sent[i]), statistics.median(seconds[i])) for i in (0, 1))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/fashion_mnist_3stage.yaml"))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, as key=value")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, [*OVERRIDES, *args.overrides])
    with tempfile.TemporaryDirectory() as folder:
        sides = run_distributed(
            measure, args.ranks, recipe_mapping(recipe), args.steps, Path(folder) / "run", timeout=1200
        )
    table = Table("", "stage-parallel", "DDP, all decoders", "ratio", title=f"{recipe.name} on {args.ranks} gloo ranks")
    for rank, (ours, common) in enumerate(sides):
        table.add_row(*row(f"state of rank {rank}, MB", ours.state / 1e6, common.state / 1e6))
    ours_W, common_W = zip(*sides, strict=True)
    table.add_row(*row("state, mean MB", mean(s.state for s in ours_W) / 1e6, mean(s.state for s in common_W) / 1e6))
    per_rank = len(sides) * 1e6
    table.add_row(*row("sent a step, MB per rank", ours_W[0].sent / per_rank, common_W[0].sent / per_rank))
    table.add_row(*row("step, seconds", ours_W[0].seconds, common_W[0].seconds))
    Console().print(table)


def mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


def row(name: str, ours: float, common: float) -> tuple[str, str, str, str]:
    return name, f"{ours:.3g}", f"{common:.3g}", f"{ours / common:.2f}"


if __name__ == "__main__":
    main()
