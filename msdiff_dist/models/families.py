"""The U-Net families that a recipe can name, each with all that is its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from msdiff_dist.models.ldm.blocks import ResBlock, UNetBlock
from msdiff_dist.models.ldm.config import LDMConfig
from msdiff_dist.models.ldm.decoder import Decoder
from msdiff_dist.models.ldm.encoder import Encoder
from msdiff_dist.models.ldm.widths import resized_decoder
from msdiff_dist.models.resizing import Resized
from msdiff_dist.models.song.blocks import SongBlock
from msdiff_dist.models.song.config import SongConfig
from msdiff_dist.models.song.decoder import SongDecoder
from msdiff_dist.models.song.encoder import SongEncoder
from msdiff_dist.models.unet_config import UNetConfig
from msdiff_dist.registry import Table


@dataclass(frozen=True, kw_only=True)
class Family:
    """A U-Net family that a recipe can name.

    Args:
        config: dataclass of the recipe section `model`; its `family` defaults to the name in the table.
        encoder: (config, stage) to the shared part: (x_BCHW, t_B, context, label, augment) to a flat tuple of
            batch-first features, raising as `config.check_conditions` does. The stage matters for widths alone.
        decoder: (config, stage) to a stage's part: features to the output [B, out_channels, H, W].
        recomputed: whether a module inside them is a block to recompute in the backward pass where
            `activation_checkpointing` asks for it.
        resized_decoder: (old, new, stage) to how each parameter of that decoder of `new` comes from the only decoder
            of `old`, None for a new one. Without it decoders keep their width when a model is grown from another.
    """

    config: type[UNetConfig]
    encoder: type[nn.Module]
    decoder: type[nn.Module]
    recomputed: Callable[[nn.Module], bool]
    resized_decoder: Callable[[Any, Any, int], dict[str, Resized | None]] | None = None


def _is_residual(module: nn.Module) -> bool:
    return isinstance(module, UNetBlock) and isinstance(module[0], ResBlock)  # a lone convolution keeps its input only


_SONG = Family(
    config=SongConfig, encoder=SongEncoder, decoder=SongDecoder, recomputed=lambda module: isinstance(module, SongBlock)
)

FAMILIES: Table[Family] = Table(
    "U-Net family",
    {
        "ldm": Family(
            config=LDMConfig, encoder=Encoder, decoder=Decoder, recomputed=_is_residual, resized_decoder=resized_decoder
        ),
        "ddpmpp": _SONG,
        "ncsnpp": _SONG,
        "ncsnpp_vp": _SONG,
    },
)
