"""A loss or gradient that is not a number ends all ranks at one step, with names, and leaves the last checkpoint."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from msdiff_dist.apps.train.local import run_local
from msdiff_dist.checkpoint.layout import complete_checkpoints
from msdiff_dist.data.make.shard_writer import write_index, write_shard
from msdiff_dist.errors import TrainingError
from msdiff_dist.testing import run_distributed
from tests.distributed.tiny_run import ADAM, open_run, recipe_of

pytestmark = pytest.mark.distributed

SAMPLES, BATCH = 96, 24


def write_latents(folder: Path, bad: int) -> None:
    """Four shards of random latents; the latent with the number `bad` holds a NaN."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for shard in range(4):
        samples = []
        for n in range(shard * SAMPLES // 4, (shard + 1) * SAMPLES // 4):
            latent = draw.standard_normal((2, 8, 8), np.float32)
            if n == bad:
                latent[1, 2, 3] = np.nan
            stream = io.BytesIO()
            np.save(stream, latent)
            samples.append((f"sample{n:03d}", {"latent.npy": stream.getvalue(), "cls": b"1"}))
        write_shard(folder / f"{shard}.tar", samples)
    write_index(folder, "bad", {f"{shard}.tar": SAMPLES // 4 for shard in range(4)})


def test_a_bad_sample_is_named(tmp_path: Path) -> None:
    write_latents(tmp_path / "data", bad=70)
    data = {
        "kind": "latent", "shards": str(tmp_path / "data"), "lanes": 4, "shuffle": 0, "latent_shape": [2, 8, 8],
        "num_classes": 3,
    }  # fmt: skip
    mapping = recipe_of(ADAM, checkpoint__every=1, train__gradient_accumulation_steps=2) | {"data": data}
    with pytest.raises(TrainingError, match=r"loss of stage \d is not finite at step 4; .*Samples: sample070$"):
        run_local(mapping, tmp_path / "run", 2)
    assert [p.name for p in complete_checkpoints(tmp_path / "run/checkpoints")][-1] == "step_00000003"


def bad_gradients(rank: int, path: Path) -> str:
    """Stage 2's gradients overflow although its losses are finite."""
    run = open_run(rank, 2, recipe_of(ADAM, parallel__placement=[[0], [1, 2]]), path)
    if rank == 1:
        parameter = next(iter(run.engines.stages[2].module.parameters()))
        parameter.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingError) as caught:
        run.step(1e-4)
    run.feed.close()
    return str(caught.value)


def test_bad_gradients_name_their_part(tmp_path: Path) -> None:
    for message in run_distributed(bad_gradients, 2, tmp_path):
        assert "gradient norm is not finite (in stage 2) at step 1" in message
