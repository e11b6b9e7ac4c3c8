"""The held-out loss of given weights is the same on any ranks, bit for bit, and the best checkpoint is kept by it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msdiff_dist.apps.train.loop import train
from msdiff_dist.checkpoint.layout import CheckpointIndex, complete_checkpoints, step_of
from msdiff_dist.data.make.shard_writer import write_index, write_shard
from msdiff_dist.distributed.heartbeat import WaitLimits
from msdiff_dist.testing import run_distributed
from msdiff_dist.training.metric_sink import SinkContext
from msdiff_dist.training.run_folder import RunFolder
from msdiff_dist.training.sinks import JsonLines, Sinks
from tests.distributed.tiny_run import ADAM, open_run, recipe_of
from tests.unit.data.conftest import npy

pytestmark = pytest.mark.distributed


def recipe_on(shards: Path, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for number in range(4):
        latents = rng.standard_normal((40, 2, 8, 8)).astype(np.float32)
        samples = [
            (f"{i}", {"latent.npy": npy(x), "cls": str(i % 3).encode()}) for i, x in enumerate(latents, 40 * number)
        ]
        write_shard(shards / f"{number}.tar", samples)
    write_index(shards, "tiny", {f"{number}.tar": 40 for number in range(4)})
    validation = {"fraction": 0.2, "num": 70, "batch_size": 8, "every": 2}
    changes |= {f"validation__{field}": value for field, value in validation.items()}
    return recipe_of(ADAM, data__kind="latent", data__shards=str(shards), **changes)


def validated(rank: int, world_size: int, recipe: dict[str, Any], path: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    with open_run(rank, world_size, recipe, path) as run:
        return run.validate()


def test_the_same_bits_on_any_ranks(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    recipe = recipe_on(tmp_path / "shards")
    found = []
    for world_size in (1, 3, 4):
        run = tmp_path / str(world_size)
        (run / "samples").mkdir(parents=True)
        of_ranks = run_distributed(validated, world_size, world_size, recipe, run)
        assert all(of_rank == of_ranks[0] for of_rank in of_ranks)
        assert list((run / "samples").iterdir()) == []  # the weights were removed
        found.append(of_ranks[0])
    assert found[0] == found[1] == found[2]
    assert found[0]["weights"] == "ema"
    assert found[0]["raw"]["loss"] == found[0]["loss"]  # nothing is trained yet


def run_to_end(rank: int, world_size: int, recipe: dict[str, Any], path: Path) -> None:
    with open_run(rank, world_size, recipe, path) as run:
        context = SinkContext(folder=RunFolder(path), first_step=0, total_steps=6, terminal=io.StringIO())
        with Sinks([JsonLines(context)] if rank == 0 else []) as sinks:
            train(run, sinks, WaitLimits(step_s=60, start_s=60), lambda: False)


def test_validations_are_recorded_and_checkpoints_kept_by_them(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    keep = {"checkpoint__every": 2, "checkpoint__keep_last": 1, "checkpoint__keep_best": True}
    # A learning rate at which the loss soon grows.
    recipe = recipe_on(tmp_path / "shards", train__steps=6, optimizer__lr=0.5, ema__decay=0.0, **keep)
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    run_distributed(run_to_end, 2, 2, recipe, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["validation"]["loss"] for line in lines if "validation" in line}
    assert sorted(losses) == [2, 4, 6]
    kept = complete_checkpoints(run / "checkpoints")
    best = min(losses, key=lambda step: losses[step])
    assert best != 6
    assert [step_of(folder) for folder in kept] == [best, 6]
    for folder in kept:
        assert CheckpointIndex.load(folder).loss == losses[step_of(folder)]
