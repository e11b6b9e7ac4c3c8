"""The host waits for the device once in a training step: for what the ranks agree on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from msdiff_dist.apps.train.trainer import Trainer
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.recipe import recipe_from, recipe_mapping
from msdiff_dist.testing import run_distributed
from msdiff_dist.training.run_folder import RunFolder
from tests.golden.cases import recipe_of
from tests.simulated_gpu import GPU, SimulatedGpu

pytestmark = pytest.mark.distributed


def waits(rank: int, world_size: int, mapping: dict[str, Any], path: Path) -> list[str]:
    """Where the host waits in the third step; in the first one clocks wait too, and optimizers make their state."""
    gpu = SimulatedGpu()
    env = Environment(rank=rank, local_rank=rank, world_size=world_size, device=GPU)
    with gpu.active(), Trainer(recipe_from(mapping), RunFolder(path), env) as run:
        run.step(1e-3)
        run.step(1e-3)
        gpu.waits.clear()
        run.step(1e-3)
        return list(gpu.waits)


@pytest.mark.parametrize(
    ("case", "world_size", "accumulation", "precision"),
    [
        ("discrete_images", 2, 1, "fp32"),
        ("edm_images", 1, 2, "fp32"),
        ("vp_latents", 1, 1, "bf16"),
        ("mixed_text_latents", 1, 2, "bf16"),
    ],
)
def test_a_step_waits_once(case: str, world_size: int, accumulation: int, precision: str, tmp_path: Path) -> None:
    recipe = recipe_of(case, tmp_path)
    train = replace(recipe.train, gradient_accumulation_steps=accumulation, precision=precision)
    mapping = recipe_mapping(replace(recipe, train=train))
    for found in run_distributed(waits, world_size, world_size, mapping, tmp_path / "run"):
        assert len(found) == 1, "\n".join(found)
        assert "copy to the host" in found[0]
        assert "agree.py" in found[0]


def waits_of_single_operations(rank: int) -> dict[str, int]:
    """How often the simulated device says that the host waits, by operation."""
    gpu, found = SimulatedGpu(), {}

    def count(name: str, action: Any) -> None:
        before = len(gpu.waits)
        action()
        found[name] = len(gpu.waits) - before

    with gpu.active():
        x, index = torch.ones(3, device=GPU), torch.tensor([0, 2])
        pinned, one = index.pin_memory(), torch.zeros((), device=GPU)
        leaf = torch.ones(3, device=GPU, requires_grad=True)
        count("item", lambda: x.sum().item())
        count("bool", lambda: bool(x.sum() > 1))
        count("tolist", lambda: x.tolist())
        count("to the host", lambda: x.to("cpu"))
        count("nonzero", lambda: x.nonzero())
        count("mask", lambda: x[x > 0])
        count("mask written", lambda: x.__setitem__(x > 0, one))
        count("list", lambda: x[[0, 2]])
        count("numbers", lambda: torch.tensor([1.0], device=GPU))
        count("pageable", lambda: index.to(GPU, non_blocking=True))
        count("blocking", lambda: pinned.to(GPU))
        count("copy_", lambda: x.copy_(torch.zeros(3)))
        count("synchronize", lambda: torch.cuda.synchronize())
        count("hook", lambda: (leaf.register_hook(lambda g: g * float(g.sum())), (leaf * x).sum().backward()))
        count("none: pinned", lambda: x[pinned.to(GPU, non_blocking=True)])
        count("none: computed", lambda: torch.where(x > 0, x, one).sum() * 2)
        count("none: filled", lambda: x[1:].fill_(3.0))
        with pytest.raises(AssertionError, match="mixes"):
            x.add(torch.ones(3))
    return found


def test_the_simulated_device_counts_what_waits() -> None:
    (found,) = run_distributed(waits_of_single_operations, 1)
    for name, count in found.items():
        assert count == (0 if name.startswith("none") else 1), name
