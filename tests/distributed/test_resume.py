"""A run stopped in one layout and resumed in another gives the losses of the run that was never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from msdiff_dist.testing import run_distributed
from tests.distributed.tiny_run import ADAM, recipe_of, trained

pytestmark = pytest.mark.distributed

SGD = {"name": "sgd", "lr": 5e-2, "momentum": 0.0, "weight_decay": 0.0}
MOMENTUM = {"name": "sgd", "lr": 5e-3, "momentum": 0.9}


def losses_of(world_size: int, mapping: dict[str, Any], path: Path, stops: list[int]) -> list[float]:
    results = run_distributed(trained, world_size, world_size, mapping, path, stops)
    assert all(losses == results[0][0] for losses, _ in results)
    return results[0][0]


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (4, {"parallel__placement": [[0], [0, 1], [1, 2], [2]], "parallel__zero_shared": 2, "parallel__zero_decoders": 2}),
    (1, {"train__gradient_accumulation_steps": 2, "data__workers": 2}),
    (3, {"parallel__zero_shared": 3}),
    (2, {"parallel__placement": [[2, 1], [0]], "parallel__zero_decoders": 2, "train__gradient_accumulation_steps": 4}),
    (2, {"parallel__zero_shared": 3, "parallel__placement": [[0, 1], [0, 1, 2]]}),
    (6, {"parallel__zero_shared": 1, "parallel__placement": [[0], [0], [0, 1], [1], [2], [2]], "data__workers": 1}),
]


@pytest.mark.parametrize(
    "optimizer", [pytest.param(ADAM, id="adamw"), pytest.param(MOMENTUM, id="momentum", marks=pytest.mark.slow)]
)
def test_every_layout_continues_every_other(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    """One run through all layouts, two steps in each, against one process that never stops."""
    steps = 2 * len(LAYOUTS)
    reference = losses_of(1, recipe_of(optimizer), tmp_path / "whole", [steps])
    parts: list[float] = []
    for i, (world_size, changes) in enumerate(LAYOUTS):
        parts += losses_of(world_size, recipe_of(optimizer, **changes), tmp_path / "parts", [2 * i + 2])
    assert parts == pytest.approx(reference, rel=1e-5)


def interrupted(rank: int, world_size: int, mapping: dict[str, Any], path: Path, at: int) -> None:
    """Train to step 4 and save at `at`; resume from there; compare losses and the network's own weights bit by bit."""
    losses, weights = trained(rank, world_size, mapping, path, [at, 4])
    if rank == 0:
        shutil.rmtree(path / "checkpoints/step_00000004")
    dist.barrier()
    losses_again, weights_again = trained(rank, world_size, mapping, path, [4])
    assert losses_again == losses[at:]
    assert weights.keys() == weights_again.keys()
    assert all(torch.equal(w, weights_again[n]) for n, w in weights.items())


@pytest.mark.parametrize(
    ("world_size", "optimizer", "changes", "at"),
    [
        (2, ADAM, {"train__gradient_accumulation_steps": 2}, 2),
        (2, ADAM, {"parallel__zero_shared": 3, "parallel__zero_decoders": 2}, 0),
        (3, MOMENTUM, {"parallel__zero_shared": 3, "parallel__zero_decoders": 2}, 2),
        (2, SGD, {"parallel__zero_shared": 2}, 2),
        (1, ADAM, {"train__precision": "bf16"}, 0),
        (2, ADAM, {"train__precision": "bf16", "parallel__zero_decoders": 2}, 2),
        (2, ADAM, {"train__precision": "bf16", "parallel__zero_shared": 3}, 2),
    ],
)
def test_same_layout_is_bitwise(
    tmp_path: Path, world_size: int, optimizer: dict[str, Any], changes: dict[str, Any], at: int
) -> None:
    """Also without moments, and stopped before the first step."""
    run_distributed(interrupted, world_size, world_size, recipe_of(optimizer, **changes), tmp_path, at)
