"""Multi-stage latent diffusion: one shared encoder, one decoder per timestep stage, stage-parallel under DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from msdiff_dist.export.timed_model import TimedModel

__version__ = "0.1.0"


def load_model(path: Path | str, ema: bool = True) -> TimedModel:
    """A trained model on the CPU: see `msdiff_dist.export.timed_model.load_model`."""
    from msdiff_dist.export import timed_model  # here, so that importing the package does not import torch

    return timed_model.load_model(path, ema)
