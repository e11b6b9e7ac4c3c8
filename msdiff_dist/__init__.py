"""Multi-stage latent diffusion: one shared encoder, one decoder per timestep stage, stage-parallel under DeepSpeed."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from msdiff_dist.export.timed_model import TimedModel

from msdiff_dist import third_party

__version__ = "0.1.0"

# Whoever imports diffusers, as `load_model` may, is warned by xformers of an extension that does not load. Where a
# recipe asks for xformers, a check says so.
logging.getLogger("xformers").setLevel(logging.ERROR)
if third_party.VARIABLE in os.environ:  # before any other library is imported
    third_party.apply()


def load_model(path: Path | str, ema: bool = True) -> TimedModel:
    """A trained model on the CPU: see `msdiff_dist.export.timed_model.load_model`."""
    from msdiff_dist.export import timed_model  # here, so that importing the package does not import torch

    return timed_model.load_model(path, ema)
