"""Images from a run folder or an export, into a folder that remembers what it is being filled with.

out/
  sampling.json   what is sampled: only the same command resumes the folder
  00000.png ...   each complete or absent
  grid.png        of the first hundred, when all are there
  .parts/         locks of the processes at work
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from msdiff_dist.distributed.environment import this_device
from msdiff_dist.errors import RunFolderError
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.evaluation.grid import class_labels, write_grid
from msdiff_dist.evaluation.sampling_job import SamplingJob
from msdiff_dist.export.weights import open_weights
from msdiff_dist.files.atomic import atomic_write, remove_partials
from msdiff_dist.files.folder_claim import FolderClaim
from msdiff_dist.files.work_share import Part, alone

_RECORD = "sampling.json"
_GRID = "grid.png"
_LOCKS = ".parts"
_IN_GRID = 100
_WRITERS = 16  # threads, for a file is on the disk only milliseconds after it is written


def sample_run(
    run: Path, out: Path, job: SamplingJob, ema: bool = True, part: Part | None = None, evaluations: int | None = None
) -> tuple[int, bool]:
    """Write the job's PNG files and grid.png into `out`, or this part of them: those that are not there yet.

    Args:
        run: a run folder, whose newest checkpoint is taken, one checkpoint, or an export.
        evaluations: exactly so many network evaluations an image, in place of the sampler's steps.

    Returns:
        How many images were there before, and whether all are there now.

    Raises:
        ConfigError: the model has no such class or sampler, or takes no prompts.
        CheckpointError: no such weights there, or corrupt ones.
        RunFolderError: `out` holds anything but these images, another process does this part, or it cannot be written.
    """
    weights = open_weights(run, ema=ema)
    num_classes = weights.description.model.num_classes
    class_labels([0], num_classes, job.class_)
    job = job.resolved(weights.description.process(), evaluations)
    generator = ImageGenerator(weights, this_device())
    generator.check_prompts(job.prompts)
    part = part or Part()
    paths = [out / f"{i:05d}.png" for i in range(job.num)]
    mine = part.share(job.batches)
    claim = FolderClaim(folder=out, record=out / _RECORD, locks=out / _LOCKS, content="images", error=RunFolderError)
    names = {_GRID, *(path.name for path in paths)}
    with claim.held(job.settings(weights), part, names), ThreadPoolExecutor(_WRITERS) as writers:
        before = sum(path.exists() for path in paths)
        remove_partials(out, [paths[i].name for index_n in mine for i in index_n])
        for index_n in track(mine, description="sampling", transient=True):
            if all(paths[i].exists() for i in index_n):
                continue
            images = job.draw(generator, index_n)
            list(writers.map(_write, images, [paths[i] for i in index_n]))
        with alone(out / _LOCKS):
            complete = all(path.exists() for path in paths)
            if complete:
                remove_partials(out, [_GRID])
                first = torch.stack([_read(path) for path in paths[:_IN_GRID]])
                write_grid(first, out / _GRID, job.columns(num_classes))
    return before, complete


def _write(image_CHW: Tensor, path: Path) -> None:
    image = Image.fromarray(image_CHW.permute(1, 2, 0).squeeze(-1).numpy())
    atomic_write(path, lambda f: image.save(f, format="PNG"))


def _read(path: Path) -> Tensor:
    pixels = np.asarray(Image.open(path))
    return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
