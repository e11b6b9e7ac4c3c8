"""The recipe section `model`: one dataclass for each U-Net family, told apart by `family`."""

from __future__ import annotations

from typing import TypeAlias

from msdiff_dist.models.ldm.config import LDMConfig
from msdiff_dist.models.song.config import SongConfig

ModelConfig: TypeAlias = LDMConfig | SongConfig
