"""Multi-stage latent diffusion: one shared encoder, one decoder per timestep stage, stage-parallel under DeepSpeed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from msdiff_dist.export.timed_model import TimedModel

__version__ = "0.1.0"

# xformers warns of an extension that does not load whenever diffusers imports it, also in commands that use neither.
# Where a recipe asks for xformers, the check of its extension says so, and `msdiff doctor` does.
logging.getLogger("xformers").setLevel(logging.ERROR)


def load_model(path: Path | str, ema: bool = True) -> TimedModel:
    """A trained model on the CPU: see `msdiff_dist.export.timed_model.load_model`."""
    from msdiff_dist.export import timed_model  # here, so that importing the package does not import torch

    return timed_model.load_model(path, ema)
