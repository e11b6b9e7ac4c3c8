"""EDM's non-leaky augmentation (2206.00364, appendix F.2).

Images are transformed, and the network gets a description of the transform as a further input. In sampling the
description is zero, "not transformed", so the transforms do not leak into the images that the model generates.

Descriptions and transforms are those of EDM's code, so that a network trained there reads them as it did. Images are
resampled at twice their resolution, between the filters of a wavelet, as in StyleGAN2-ADA (2006.06676, appendix B).
"""

from __future__ import annotations

import functools
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
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
"""Low-pass filter of Daubechies' least asymmetric wavelet with six vanishing moments. It is orthonormal to its even
shifts, so to go to twice the resolution and back leaves an image as it was."""
_SCALE_STD = 0.2  # standard deviation of log2 of the scale and of the anisotropy
_TRANSLATION_STD = 0.125  # standard deviation of a shift, as a fraction of the image's size
_BEFORE = len(SYM6) // 2 - 1  # taps before the middle one, which lies on the pixel


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
    """The transforms of n square images, of which m are resampled. Drawn on the host, applied on any device.

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
    # matrix, because each new pixel asks where it comes from.
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

    The old image is mirrored about its outermost pixels, up to its own size beyond each border, and zero from there on.

    Args:
        inverse_n33: acts on positions (x, y, 1) from the centre, in units of half the width and half the height.
    """
    (H, W), margin = x_nCHW.shape[-2:], len(SYM6) // 4
    # EDM pads as far as the batch's farthest transform asks. Padded in full, an image does not depend on the others.
    wide_nCHW = _doubled(F.pad(x_nCHW, (W - 1, W - 1, H - 1, H - 1), mode="reflect"))
    # Positions of the new pixels at twice the resolution, with a margin for the filter that halves it. There pixel i of
    # an image is pixel 2 i, whose centre lies half a pixel before its own.
    y_H, x_W = (torch.arange(2 * n, device=x_nCHW.device) - (n - 1) for n in (H + 2 * margin, W + 2 * margin))
    x_1W, y_H1 = x_W / W, y_H[:, None] / H
    # No product of matrices, which may be computed in TF32: that is too coarse for positions.
    a, b, c, d, e, f = inverse_n33[:, :2].flatten(1).T[:, :, None, None]
    old_nHW2 = torch.stack([W * (a * x_1W + b * y_H1 + c) - 0.5, H * (d * x_1W + e * y_H1 + f) - 0.5], dim=-1)
    halves = [size / 2 for size in (wide_nCHW.shape[3], wide_nCHW.shape[2])]
    grid_nHW2 = torch.stack([old_nHW2[..., k] / halves[k] for k in (0, 1)], dim=-1)
    moved_nCHW = F.grid_sample(wide_nCHW, grid_nHW2, mode="bilinear", padding_mode="zeros", align_corners=False)
    return _halved(moved_nCHW)[:, :, margin:-margin, margin:-margin]


def _doubled(x_nCHW: Tensor) -> Tensor:
    """The images at twice the resolution, [n, C, 2 H, 2 W], low-pass filtered."""
    x, taps, before = x_nCHW.flatten(0, 1)[:, None], _low_pass(x_nCHW.device), _BEFORE
    x = F.conv_transpose2d(x, taps.view(1, 1, -1, 1), stride=(2, 1), padding=(before, 0))
    x = F.conv_transpose2d(x, taps.view(1, 1, 1, -1), stride=(1, 2), padding=(0, before))
    return x.view(*x_nCHW.shape[:2], *x.shape[2:])


def _halved(x_nCHW: Tensor) -> Tensor:
    """The images at half the resolution, [n, C, H / 2, W / 2], low-pass filtered: the transpose of `_doubled`."""
    x, taps, before = x_nCHW.flatten(0, 1)[:, None], _low_pass(x_nCHW.device), _BEFORE
    x = F.conv2d(x, taps.view(1, 1, -1, 1), stride=(2, 1), padding=(before, 0))
    x = F.conv2d(x, taps.view(1, 1, 1, -1), stride=(1, 2), padding=(0, before))
    return x.view(*x_nCHW.shape[:2], *x.shape[2:])


@functools.cache
def _low_pass(device: torch.device) -> Tensor:
    # Kept, because a copy to a GPU would wait for it at every step.
    return torch.tensor(SYM6, device=device)


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
    # Rotate, squeeze along `axis` (longer there by `ratio`, shorter across by as much), scale, then translate. Positive
    # angles turn counterclockwise as in EDM's code: from +x to -y, since rows count down.
    factor, ratio = 2 ** (_SCALE_STD * scale), 2 ** (_SCALE_STD * squeeze)
    matrix = np.eye(3)
    matrix[:2, :2] = _rotation(-axis) @ np.diag([ratio, 1 / ratio]) @ _rotation(axis) @ _rotation(-angle) * factor
    matrix[:2, 2] = 2 * _TRANSLATION_STD * shift  # an image is two half widths wide
    return label, matrix


def _rotation(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]])
