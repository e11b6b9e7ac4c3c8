"""The recipe section `model`: its field `family` selects the dataclass (`LDMConfig`, `SongConfig`, ...)."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msdiff_dist.models.separate  # noqa: F401  adds a family, whose stages are networks of the others
from msdiff_dist.config import Variant
from msdiff_dist.models.families import FAMILIES
from msdiff_dist.models.unet_config import UNetConfig

ModelConfig: TypeAlias = Annotated[UNetConfig, Variant(FAMILIES, "family", default="ldm")]
