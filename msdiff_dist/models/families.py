"""The table of U-Net families that a recipe can name: each entry holds what differs from family to family."""

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
        encoder: called with (config, stage), builds a module that maps (x_BCHW, t_B, context, label, augment) to a flat
            tuple of batch-first features and raises what `config.check_conditions` raises. The stage only selects the
            width, where each stage has an encoder of its own. None: the stages are whole networks of other families.
        decoder: called with (config, stage), builds a module that maps those features to the output
            [B, out_channels, H, W]. None as above.
        recomputed: predicate of modules inside encoder and decoder: True for a block that `activation_checkpointing`
            recomputes in the backward pass.
        resized_decoder: called with (old config, new config, stage), returns for each parameter of that decoder of
            the new model how it is made from the only decoder of the old one; None for a parameter that is new.
            A family without this function keeps the width of its decoders when a model is grown from another.
        middle: which of the encoder's features, by index, is its deepest feature map [B, C, h, w], which `guide` aligns
            with a teacher's; None: a recipe of this family takes no `guide`.
    """

    config: type[UNetConfig]
    encoder: type[nn.Module] | None = None
    decoder: type[nn.Module] | None = None
    recomputed: Callable[[nn.Module], bool] = lambda module: False
    resized_decoder: Callable[[Any, Any, int], dict[str, Resized | None]] | None = None
    middle: int | None = None


def _is_residual(module: nn.Module) -> bool:
    # A block that is one convolution saves nothing but its input anyway: recomputing it would free no memory.
    return isinstance(module, UNetBlock) and isinstance(module[0], ResBlock)


_SONG = Family(
    config=SongConfig,
    encoder=SongEncoder,
    decoder=SongDecoder,
    recomputed=lambda module: isinstance(module, SongBlock),
    middle=-1,  # the middle block's output, or the deepest skip where the decoders have middle blocks of their own
)

FAMILIES: Table[Family] = Table(
    "U-Net family",
    {
        "ldm": Family(
            config=LDMConfig,
            encoder=Encoder,
            decoder=Decoder,
            recomputed=_is_residual,
            resized_decoder=resized_decoder,
            middle=0,
        ),
        "ddpmpp": _SONG,
        "ncsnpp": _SONG,
        "ncsnpp_vp": _SONG,
    },
)
