"""EDM's non-leaky augmentation: images are transformed and the network is told how (2206.00364, appendix F.2).

Told "not at all" when it samples, it makes images like the untransformed ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from msdiff_dist.errors import ConfigError
from msdiff_dist.randomness import augmentation

AUGMENT_LABELS = 9
"""Length of the description: mirrored, upside down, scaling, rotation (2), anisotropy (2), translation (2)."""
_SCALE_STD = 0.2  # of the binary logarithm, for scaling and anisotropy
_TRANSLATION_STD = 0.125  # of the image's size


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """EDM's non-leaky augmentation."""

    probability: float
    """Probability of each transform of an image, except mirroring, which has 1/2. EDM: 0.12 for CIFAR-10."""

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError("probability", self.probability, "must lie in [0, 1]", "EDM uses 0.12 for CIFAR-10.")


def augment(
    x_nCHW: Tensor, config: AugmentationConfig, seed: int, batch: int, index_n: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Transformed images, and what was done to each: float32 [n, AUGMENT_LABELS], all zero for nothing.

    Each image's transform depends on (seed, global batch, its index there) alone.
    """
    drawn = [_draw(config.probability, augmentation(seed, batch, i)) for i in index_n.tolist()]
    label_n = torch.tensor(np.array([label for label, _ in drawn]), dtype=torch.float32, device=x_nCHW.device)
    mirrored_n, upside_down_n = (label_n[:, k].bool()[:, None, None, None] for k in (0, 1))
    x_nCHW = torch.where(mirrored_n, x_nCHW.flip(3), x_nCHW)
    x_nCHW = torch.where(upside_down_n, x_nCHW.flip(2), x_nCHW)
    moved = [i for i, (_, matrix) in enumerate(drawn) if matrix is not None]
    if moved:
        inverse = np.linalg.inv(np.stack([m for _, m in drawn if m is not None]))
        x_nCHW[moved] = resampled(x_nCHW[moved], torch.from_numpy(inverse).to(x_nCHW))
    return x_nCHW, label_n


def resampled(x_nCHW: Tensor, inverse_n33: Tensor) -> Tensor:
    """Images whose pixel at p is the old one at inverse p, interpolated cubically, mirrored beyond the border.

    Positions are (x, y, 1) from the centre, in half widths and half heights.
    """
    grid = F.affine_grid(inverse_n33[:, :2], list(x_nCHW.shape), align_corners=False)
    return F.grid_sample(x_nCHW, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def _draw(probability: float, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """Description of one image's transform, and the matrix that moves its pixels, if it moves them."""
    happens, coins = random.random(5) < probability, random.random(3) < 0.5
    angle, axis = random.uniform(-math.pi, math.pi, 2)
    scale, stretch, *shift = random.standard_normal(4)
    flips = coins[0], coins[1] and happens[0]
    scale, angle, stretch = scale * happens[1], angle * happens[2], stretch * happens[3]
    axis, shift = axis * coins[2], np.array(shift) * happens[4]
    rotation, anisotropy = (math.cos(angle) - 1, math.sin(angle)), (stretch * math.cos(axis), stretch * math.sin(axis))
    label = np.array([*flips, scale, *rotation, *anisotropy, *shift])
    if not happens[1:].any():
        return label, None
    factor, ratio = 2 ** (_SCALE_STD * scale), 2 ** (_SCALE_STD * stretch)
    matrix = np.eye(3)
    matrix[:2, :2] = _rotation(axis) @ np.diag([ratio, 1 / ratio]) @ _rotation(-axis) @ _rotation(angle) * factor
    matrix[:2, 2] = 2 * _TRANSLATION_STD * shift  # an image is 2 units wide
    return label, matrix


def _rotation(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]])
