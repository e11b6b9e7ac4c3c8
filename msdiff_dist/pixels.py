"""Pixels and the numbers that networks and statistics take for them."""

from __future__ import annotations

import torch
from torch import Tensor


def to_model_range(x: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1]; latents to float32, unchanged."""
    return centred(x.float()) if x.dtype == torch.uint8 else x.float()


def to_pixels(x: Tensor) -> Tensor:
    """Values in [-1, 1], clamped to them, to the nearest of the 256 levels, as uint8."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def centred(levels: Tensor) -> Tensor:
    """Levels 0 to 255, of any floating type, to [-1, 1]."""
    return levels / 127.5 - 1


def unit(levels: Tensor) -> Tensor:
    """Levels 0 to 255, of any floating type, to [0, 1]."""
    return levels / 255
