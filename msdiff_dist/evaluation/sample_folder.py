"""Pictures from a run folder or an export, into a folder that remembers what it is being filled with.

out/
  sampling.json   what is sampled: only the same command goes on with the folder
  00000.png ...   written aside and renamed: whole or not there
  grid.png        of the first hundred, when all are there
  .parts/         locks of the processes at work
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from msdiff_dist.config import differences, to_mapping
from msdiff_dist.diffusion.solvers import SOLVERS, SamplerConfig
from msdiff_dist.errors import ConfigError, RunFolderError
from msdiff_dist.evaluation.generate import Generator
from msdiff_dist.evaluation.grid import class_labels, write_grid
from msdiff_dist.export.weights import open_weights
from msdiff_dist.files.work_share import Part, alone, working
from msdiff_dist.training.run_folder import replace_text

_RECORD = "sampling.json"
_GRID = "grid.png"
_LOCKS = ".parts"
_IN_GRID = 100


def sample_run(
    run: Path,
    out: Path,
    num: int,
    sampler: SamplerConfig,
    class_: int | None,
    seed: int,
    batch_size: int,
    ema: bool,
    prompts: Sequence[str] = (),
    part: Part | None = None,
    evaluations: int | None = None,
) -> tuple[int, bool]:
    """Write `num` PNG files and grid.png into `out`, or this part of them: those that are not there yet.

    Args:
        run: a run folder, whose newest checkpoint is taken, one checkpoint, or an export.
        batch_size: pictures made together; the last bits of a picture depend on it.
        prompts: of the pictures in turn.
        evaluations: exactly so many network evaluations a picture, in place of the sampler's steps.

    Returns:
        How many pictures were there before, and whether all are there now.

    Raises:
        CheckpointError: no such weights there, or damaged. RunFolderError: `out` holds anything but these pictures, or
            another process is at work on it.
    """
    weights = open_weights(run, ema=ema)
    description = weights.description
    num_classes = description.model.num_classes
    class_labels([0], num_classes, class_)
    process = description.process()
    try:
        if evaluations is not None:
            name = sampler.name or process.sampler
            sampler = replace(sampler, name=name, steps=SOLVERS.choose("name", name).steps_of(evaluations))
        sampler = sampler.for_process(process)
    except ConfigError as e:
        steps = "steps" if evaluations is None else "nfe"
        option = {"name": "sampler", "steps": steps, "evaluations": "nfe"}.get(e.field, e.field)
        raise ConfigError(f"--{option}", e.value, e.problem, e.remedy) from None
    settings = {
        "source": {"step": description.step, "weights": description.weights, "sha256": weights.identity()},
        "num": num,
        "seed": seed,
        "class": class_,
        "prompts": list(prompts),
        "sampler": to_mapping(sampler),
        "batch_size": batch_size,
    }
    generator = Generator(weights, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    generator.check_prompts(prompts)
    paths = [out / f"{i:05d}.png" for i in range(num)]
    batches = [list(range(i, min(i + batch_size, num))) for i in range(0, num, batch_size)]
    with _opened(out, settings, paths, part or Part()):
        before = sum(path.exists() for path in paths)
        for index_n in track((part or Part()).share(batches), description="sampling", transient=True):
            if all(paths[i].exists() for i in index_n):
                continue
            images = generator(index_n, sampler, seed, class_labels(index_n, num_classes, class_), prompts)
            for i, image in zip(index_n, images, strict=True):
                _write(image, paths[i])
        with alone(out / _LOCKS):
            complete = all(path.exists() for path in paths)
            if complete:
                columns = num_classes if class_ is None and (num_classes or 99) <= 20 else None
                write_grid(torch.stack([_read(path) for path in paths[:_IN_GRID]]), out / _GRID, columns)
    return before, complete


@contextmanager
def _opened(out: Path, settings: Mapping[str, Any], paths: Sequence[Path], part: Part) -> Iterator[None]:
    """Take the folder, or this part of it, for this process; refuse one that holds anything but this sampling."""
    ours = {_RECORD, _LOCKS, *(p.name for path in [*paths, out / _GRID] for p in (path, _aside(path)))}
    there = {p.name for p in out.iterdir()} if out.exists() else set()
    if there - {_LOCKS} and _RECORD not in there:
        raise RunFolderError("--out", str(out), "is not empty", "Name a new folder.")
    record = out / _RECORD
    try:
        with working(out / _LOCKS, part):
            with alone(out / _LOCKS):
                if text := record.read_text() if record.exists() else "":
                    changed = [f"{f} was {a!r}, now {b!r}" for f, a, b in differences(json.loads(text), settings)]
                    if changed:
                        problem = f"holds the pictures of another command ({'; '.join(changed)})"
                        raise RunFolderError("--out", str(out), problem, "Give that command, or name a new folder.")
                if foreign := sorted(there - ours):
                    remedy = "Remove it, or name a new folder."
                    raise RunFolderError("--out", str(out), f"holds {foreign[0]} too", remedy)
                if not text:
                    replace_text(record, json.dumps(settings, indent=1) + "\n")
            yield
    except BlockingIOError:
        raise RunFolderError("--out", str(out), "is being filled by another process", "Wait for it.") from None


def _write(image_CHW: Tensor, path: Path) -> None:
    aside = _aside(path)
    Image.fromarray(image_CHW.permute(1, 2, 0).squeeze(-1).numpy()).save(aside, format="PNG")
    aside.rename(path)


def _read(path: Path) -> Tensor:
    pixels = np.asarray(Image.open(path))
    return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}")
