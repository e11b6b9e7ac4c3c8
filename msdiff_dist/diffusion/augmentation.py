"""EDM's non-leaky augmentation (2206.00364, appendix F.2).

Images are transformed, and the network gets a description of the transform as a further input. In sampling the
description is zero, "not transformed", so the transforms do not leak into the images that the model generates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from msdiff_dist.errors import ConfigError
from msdiff_dist.randomness import augmentations

AUGMENT_LABELS = 9
"""Length of the description: mirrored, upside down, scale, rotation (2), anisotropy (2), translation (2)."""
_SCALE_STD = 0.2  # standard deviation of log2 of the scale and of the anisotropy
_TRANSLATION_STD = 0.125  # standard deviation of a shift, as a fraction of the image's size


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """EDM's non-leaky augmentation of images. The model needs `augment_labels: 9`."""

    probability: float
    """Probability of each transform of an image, except mirroring, which has 1/2. EDM: 0.12 for CIFAR-10."""

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError("probability", self.probability, "must lie in [0, 1]", "EDM uses 0.12 for CIFAR-10.")


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """The transforms of n images, of which m are resampled. Drawn on the host, applied by `transformed` on any device.

    Attributes:
        label_n: descriptions, float32 [n, AUGMENT_LABELS], zero for no transform.
        moved_m: int64, the images to resample.
        inverse_m33: float32, the inverses of their matrices (see `resampled`).
    """

    label_n: Tensor
    moved_m: Tensor
    inverse_m33: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Transforms:
        """The same transforms with every tensor replaced by `change` of it, which may move it."""
        return Transforms(
            label_n=change(self.label_n), moved_m=change(self.moved_m), inverse_m33=change(self.inverse_m33)
        )


def draw_transforms(config: AugmentationConfig, seed: int, batch: int, index_n: np.ndarray) -> Transforms:
    """The transforms of the images with these indices in the global batch.

    An image's transform depends only on the seed, the number of the global batch and the image's index in it.
    """
    drawn = [_draw(config.probability, random) for random in augmentations(seed, batch, index_n)]
    label_n = np.array([label for label, _ in drawn]).reshape(-1, AUGMENT_LABELS)
    matrix_m33 = np.array([matrix for _, matrix in drawn if matrix is not None]).reshape(-1, 3, 3)
    return Transforms(
        label_n=torch.from_numpy(label_n).float(),
        moved_m=torch.tensor([i for i, (_, matrix) in enumerate(drawn) if matrix is not None], dtype=torch.int64),
        inverse_m33=torch.from_numpy(np.linalg.inv(matrix_m33)).float(),
    )


def transformed(x_nCHW: Tensor, transforms: Transforms) -> Tensor:
    """The images [n, C, H, W] after their transforms, which are on the same device."""
    # Flips are exact copies of pixels. All other transforms of an image are one resampling, by the inverse of their
    # matrix, because `resampled` asks where each new pixel comes from.
    mirrored_n, upside_down_n = (transforms.label_n[:, k].bool()[:, None, None, None] for k in (0, 1))
    x_nCHW = torch.where(mirrored_n, x_nCHW.flip(3), x_nCHW)
    x_nCHW = torch.where(upside_down_n, x_nCHW.flip(2), x_nCHW)
    # The images are chosen by number: their count must be known here, and a mask would make a GPU tell it.
    moved_m = transforms.moved_m
    if len(moved_m):
        x_nCHW = x_nCHW.index_copy(0, moved_m, resampled(x_nCHW[moved_m], transforms.inverse_m33))
    return x_nCHW


def resampled(x_nCHW: Tensor, inverse_n33: Tensor) -> Tensor:
    """Images whose pixel at position p has the value of the old image at inverse p.

    Values are interpolated by cubics, and the old image is mirrored beyond its border.

    Args:
        inverse_n33: acts on positions (x, y, 1) from the centre, in units of half the width and half the height.
    """
    grid = F.affine_grid(inverse_n33[:, :2], list(x_nCHW.shape), align_corners=False)
    return F.grid_sample(x_nCHW, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def _draw(probability: float, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """Description of one image's transform, and its 3x3 matrix on positions; None where there is nothing to resample.

    Everything is drawn always, so that no draw depends on another's outcome.
    """
    happens, coins = random.random(5) < probability, random.random(3) < 0.5
    angle, axis = random.uniform(-math.pi, math.pi, 2)
    scale, squeeze, *shift = random.standard_normal(4)
    flips = coins[0], coins[1] and happens[0]
    # A transform that does not happen has the parameter of the identity. Half of the squeezes are along the x axis.
    scale, angle, squeeze = scale * happens[1], angle * happens[2], squeeze * happens[3]
    axis, shift = axis * coins[2], np.array(shift) * happens[4]
    # EDM's description: cos - 1, so that no rotation is (0, 0).
    rotation, anisotropy = (math.cos(angle) - 1, math.sin(angle)), (squeeze * math.cos(axis), squeeze * math.sin(axis))
    label = np.array([*flips, scale, *rotation, *anisotropy, *shift])
    if not happens[1:].any():
        return label, None
    # Rotate, squeeze along `axis` (longer there by `ratio`, shorter across by as much), scale, then translate.
    factor, ratio = 2 ** (_SCALE_STD * scale), 2 ** (_SCALE_STD * squeeze)
    matrix = np.eye(3)
    matrix[:2, :2] = _rotation(axis) @ np.diag([ratio, 1 / ratio]) @ _rotation(-axis) @ _rotation(angle) * factor
    matrix[:2, 2] = 2 * _TRANSLATION_STD * shift  # an image is two half widths wide
    return label, matrix


def _rotation(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]])
