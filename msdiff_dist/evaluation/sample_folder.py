"""Samples images of a run or an export into a folder. Several processes may fill it; the same command resumes it.

out/
  sampling.json   settings of the command that fills the folder: only the same settings resume it
  00000.png ...   images by number, each complete or absent
  grid.png        the first hundred images, written when all are there
  .parts/         locks of the processes at work
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msdiff_dist.distributed.environment import this_device
from msdiff_dist.errors import RunFolderError
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.evaluation.grid import class_labels, write_grid
from msdiff_dist.evaluation.sampling_job import SamplingJob
from msdiff_dist.export.weights import Weights, open_weights
from msdiff_dist.files.atomic import atomic_write, remove_partials
from msdiff_dist.files.folder_claim import FolderClaim
from msdiff_dist.files.work_share import Part, alone
from msdiff_dist.terminal import LongWork

_RECORD = "sampling.json"
_GRID = "grid.png"
_LOCKS = ".parts"
_IN_GRID = 100
_WRITERS = 16  # threads: each file waits milliseconds until the disk has it, and so many can wait at once


class FolderSampling:
    """A sampling job with the weights that it samples from. Requests that the model cannot meet are refused here.

    Args:
        run: a run folder, whose newest checkpoint is used, a checkpoint, or an export.
        ema: use the averaged weights.
        evaluations: number of network evaluations per image, instead of the sampler's `steps`.

    Raises:
        ConfigError: the model has no such class, takes no prompts, or its process is not sampled by this sampler.
        CheckpointError: there are no such weights, or they are corrupt.
    """

    def __init__(self, run: Path, job: SamplingJob, ema: bool = True, evaluations: int | None = None) -> None:
        self._weights = open_weights(run, ema=ema)
        description = self._weights.description
        class_labels([0], description.model.num_classes, job.class_)
        self._job = job.resolved(description.process(), evaluations)
        self._generator = ImageGenerator(self._weights, this_device())
        self._generator.check_prompts(job.prompts)

    def fill(self, out: Path, part: Part | None = None, option: str = "--out") -> tuple[int, bool]:
        """Write the images of the job, or a part of them, into `out`, and grid.png once all are there.

        Batches whose images all exist are skipped.

        Args:
            part: share of the batches that this process samples; None: all.
            option: the command's option that names `out`, for messages.

        Returns:
            How many images existed before, and whether all exist now.

        Raises:
            RunFolderError: `out` holds other files or is filled with other settings, another process does this part, or
                the folder cannot be written.
        """
        return _fill(out, self._job, self._weights, self._generator, part or Part(), option)


def sample_run(
    run: Path,
    out: Path,
    job: SamplingJob,
    ema: bool = True,
    part: Part | None = None,
    evaluations: int | None = None,
    option: str = "--out",
) -> tuple[int, bool]:
    """`FolderSampling` and its `fill` in one call: how many images existed before, and whether all exist now."""
    return FolderSampling(run, job, ema, evaluations).fill(out, part, option)


def _fill(
    out: Path, job: SamplingJob, weights: Weights, generator: ImageGenerator, part: Part, option: str
) -> tuple[int, bool]:
    paths = [image_path(out, i) for i in range(job.num)]
    mine = part.share(job.batches)
    record, locks = out / _RECORD, out / _LOCKS
    claim = FolderClaim(folder=out, record=record, locks=locks, content="images", error=RunFolderError, option=option)
    names = {_GRID, *(path.name for path in paths)}
    with claim.held(job.settings(weights), part, names), ThreadPoolExecutor(_WRITERS) as writers:
        before = sum(path.exists() for path in paths)
        remove_partials(out, [paths[i].name for index_n in mine for i in index_n])
        # A whole batch is sampled even if one image is missing: its last bits depend on the batch.
        missing = [index_n for index_n in mine if not all(paths[i].exists() for i in index_n)]
        total, to_make = (sum(map(len, batches)) for batches in (mine, missing))
        with LongWork("sampling", total, "images", done=total - to_make) as work:
            for index_n in missing:
                images = job.draw(generator, index_n, work)
                list(writers.map(write_image, images, [paths[i] for i in index_n]))
        # Several processes may end at once: one at a time checks whether all images are there and writes the grid.
        with alone(out / _LOCKS):
            complete = all(path.exists() for path in paths)
            if complete:
                remove_partials(out, [_GRID])
                first = torch.stack([_read(path) for path in paths[:_IN_GRID]])
                write_grid(first, out / _GRID, job.columns(generator.num_classes))
    return before, complete


def image_path(folder: Path, number: int) -> Path:
    """The file of the image with this number."""
    return folder / f"{number:05d}.png"


def write_image(image_CHW: Tensor, path: Path) -> None:
    """Write a uint8 image [C, H, W] as PNG, complete or not at all."""
    image = Image.fromarray(image_CHW.permute(1, 2, 0).squeeze(-1).numpy())
    atomic_write(path, lambda f: image.save(f, format="PNG"))


def _read(path: Path) -> Tensor:
    pixels = np.asarray(Image.open(path))
    return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
