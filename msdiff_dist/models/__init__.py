"""Single-device networks; they know no ranks."""

from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.multistage_unet import MultistageUNet, build_model, build_parts

__all__ = ["ModelConfig", "MultistageUNet", "build_model", "build_parts"]
