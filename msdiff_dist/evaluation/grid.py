"""Grids of images: the recipe section `preview`, the classes of images by number, and the PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from msdiff_dist.bounds import check_between, check_seed
from msdiff_dist.diffusion.solvers import SamplerConfig
from msdiff_dist.errors import ConfigError
from msdiff_dist.files.atomic import atomic_write

MOST_IN_GRID = 10_000
"""Images that one grid may have."""
_GRID_SIDE = 900  # pixels that the longer side of an enlarged grid may have


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Grids of images that training samples with the averaged weights."""

    every: int = 0
    """Steps between grids; there is one after the last step as well. 0: no grids."""
    num: int = 64
    """Number of images in a grid."""
    batch_size: int = 16
    """Images that a rank samples at once, beside the training state in its memory. No more ranks than there are batches
    read the weights and sample. An image's last bits depend on it."""
    seed: int = 0
    """Seed of the images."""
    prompts: tuple[str, ...] = ()
    """Prompts for a model that takes text: image i has prompt i modulo their number."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the images are sampled."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError("every", self.every, "must not be negative", "Use 0 for no grids.")
        if self.num < 1:
            raise ConfigError("num", self.num, "must be at least 1", "A grid of 64 shows enough.")
        check_between("num", self.num, 1, MOST_IN_GRID)
        check_between("batch_size", self.batch_size, 1, 2**63 - 1)
        check_seed("seed", self.seed)


def class_labels(index_n: Sequence[int], num_classes: int | None, only: int | None = None) -> Tensor | None:
    """Labels int64 [n] of the images with the numbers `index_n`; None for a model without classes.

    Image i has class i modulo `num_classes`, or every image has the class `only`.

    Raises:
        ConfigError: there is no class `only`.
    """
    if only is not None and not 0 <= only < (num_classes or 0):
        known = f"the model's classes are 0 to {num_classes - 1}" if num_classes else "the model has no classes"
        raise ConfigError("--class", only, known, "Choose one of them." if num_classes else "Omit --class.")
    if num_classes is None:
        return None
    return torch.tensor([i % num_classes if only is None else only for i in index_n])


def write_grid(images_NCHW: Tensor, path: Path, columns: int | None = None) -> None:
    """Write uint8 images [N, C, H, W] as one PNG with space between them. Small grids are enlarged without smoothing.

    Args:
        columns: images in a row; None: about the square root of N.
    """
    from torchvision.utils import make_grid

    columns = columns or max(1, round(len(images_NCHW) ** 0.5))
    grid_CHW = make_grid(images_NCHW, nrow=columns, padding=2, pad_value=128)
    image = Image.fromarray(grid_CHW.permute(1, 2, 0).numpy())
    scale = max(1, _GRID_SIDE // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    atomic_write(path, lambda f: image.save(f, format="PNG"))
