"""A grid is the same on any number of ranks, and drawn by no more of them than it has batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.testing import run_distributed
from tests.distributed.tiny_run import ADAM, open_run, recipe_of

pytestmark = pytest.mark.distributed

PREVIEW = {"preview__every": 1, "preview__num": 7, "preview__batch_size": 3, "preview__sampler": {"steps": 3}}
IMAGES = {"data__kind": "synthetic", "data__latent_shape": [3, 8, 8], "model__in_channels": 3, "model__out_channels": 3}


def drawn(rank: int, world_size: int, path: Path) -> int:
    """Draw a grid; how many times this rank opened the weights."""
    opened = []
    init = CheckpointReader.__init__
    CheckpointReader.__init__ = lambda self, folder: (opened.append(folder), init(self, folder))[1]  # type: ignore[method-assign]
    with open_run(rank, world_size, recipe_of(ADAM, **PREVIEW, **IMAGES), path) as run:
        opened.clear()
        run.preview()
    return len(opened)


def test_a_grid_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    grids = []
    for world_size, readers in ((1, [1]), (4, [1, 1, 1, 0])):
        run = tmp_path / str(world_size)
        (run / "samples").mkdir(parents=True)
        assert run_distributed(drawn, world_size, world_size, run) == readers
        (grid,) = (run / "samples").glob("*.png")
        grids.append(np.asarray(Image.open(grid)).astype(int))
    assert grids[0].shape == grids[1].shape
    assert abs(grids[0] - grids[1]).max() <= 1, "rounding may differ with the batch"
    assert grids[0].std() > 5, "images are not of one colour"
