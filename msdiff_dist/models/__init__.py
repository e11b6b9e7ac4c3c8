"""Networks on one device. Ranks, groups and communication are the business of `distributed`."""

from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.ldm.config import LDMConfig
from msdiff_dist.models.multistage_unet import MultistageUNet, build_model, build_parts
from msdiff_dist.models.song.config import SongConfig

__all__ = ["LDMConfig", "ModelConfig", "MultistageUNet", "SongConfig", "build_model", "build_parts"]
