"""Pictures from a run folder or an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from msdiff_dist.checkpoint.weights import open_weights
from msdiff_dist.diffusion.sampling import SamplerConfig
from msdiff_dist.errors import ConfigError, RunFolderError
from msdiff_dist.evaluation.generate import Generator
from msdiff_dist.evaluation.preview import class_labels, write_grid


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
) -> None:
    """Write `num` PNG files and grid.png into the new folder `out`.

    Args:
        run: a run folder, whose newest checkpoint is taken, one checkpoint, or an export.
        prompts: of the pictures in turn.
        ema: with the averaged weights, else with the last ones.

    Raises:
        CheckpointError: no such weights there, or damaged. RunFolderError: `out` holds files already.
    """
    weights = open_weights(run, ema=ema)
    num_classes = weights.description.model.num_classes
    if out.exists() and any(out.iterdir()):
        raise RunFolderError("--out", str(out), "is not empty", "Name a new folder.")
    class_labels([0], num_classes, class_)
    try:
        sampler = sampler.for_process(weights.description.process())
    except ConfigError as e:
        option = "sampler" if e.field == "name" else e.field
        raise ConfigError(f"--{option}", e.value, e.problem, e.remedy) from None
    generator = Generator(weights, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    generator.check_prompts(prompts)
    out.mkdir(parents=True, exist_ok=True)
    grid: list[Tensor] = []
    batches = [list(range(i, min(i + batch_size, num))) for i in range(0, num, batch_size)]
    for index_n in track(batches, description="sampling", transient=True):
        images = generator(index_n, sampler, seed, class_labels(index_n, num_classes, class_), prompts)
        for i, image in zip(index_n, images, strict=True):
            pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
            Image.fromarray(pixels).save(out / f"{i:05d}.png")
        grid += [image for image in images if len(grid) < 100]
    classes = num_classes if class_ is None else None
    write_grid(torch.stack(grid[:100]), out / "grid.png", classes if (classes or 99) <= 20 else None)
