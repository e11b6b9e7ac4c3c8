"""Between pixels, as levels 0 to 255, and the ranges of numbers that networks and statistics take. Any shape."""

from __future__ import annotations

import torch
from torch import Tensor


def to_model_range(x: Tensor) -> Tensor:
    """Convert uint8 pixels to float32 in [-1, 1], and latents to float32 with unchanged values."""
    return centred(x.float()) if x.dtype == torch.uint8 else x.float()


def to_pixels(x: Tensor) -> Tensor:
    """Clamp values to [-1, 1] and round them to the nearest of the 256 levels, as uint8."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def centred(levels: Tensor) -> Tensor:
    """Map levels 0 to 255, of any floating type, to [-1, 1]."""
    return levels / 127.5 - 1


def unit(levels: Tensor) -> Tensor:
    """Map levels 0 to 255, of any floating type, to [0, 1]."""
    return levels / 255
