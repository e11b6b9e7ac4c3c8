"""The decoder of one stage: up path and output head, at its own width and with its own attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msdiff_dist.models.attention import zero_init
from msdiff_dist.models.group_norm import GroupNorm
from msdiff_dist.models.ldm.blocks import ResBlock, UNetBlock, Upsample, attention_block
from msdiff_dist.models.ldm.config import LDMConfig


class Decoder(nn.Module):
    """Maps an encoder's features to the network's output at the times of one stage.

    Args:
        stage: selects width and attention.
    """

    def __init__(self, config: LDMConfig, stage: int) -> None:
        super().__init__()
        self.has_context = config.context_dim is not None
        emb_channels = config.emb_channels(stage)
        self.output_blocks = nn.ModuleList()
        blocks = config.up_blocks(stage)
        for block in blocks:
            channels = block.out_channels
            layers: list[nn.Module] = [ResBlock(config, block.in_channels, emb_channels, channels)]
            if block.downsampling in config.attention_of(stage):
                layers.append(attention_block(config, channels))
            if block.resamples:
                layers.append(
                    ResBlock(config, channels, emb_channels, channels, resample="up")
                    if config.resblock_updown
                    else Upsample(channels)
                )
            self.output_blocks.append(UNetBlock(*layers))
        self.out = nn.Sequential(
            GroupNorm(config.norm_groups, blocks[-1].out_channels, silu=True),
            nn.Identity(),
            zero_init(nn.Conv2d(blocks[-1].out_channels, config.out_channels, 3, padding=1)),
        )

    def forward(self, *features: Tensor) -> Tensor:
        """Output [B, out_channels, H, W] from the features of `Encoder.forward`: (h, emb, [context,] *skips)."""
        h, emb_BE, *skips = features
        context = skips.pop(0) if self.has_context else None
        for block, skip in zip(self.output_blocks, reversed(skips), strict=True):
            h = block(torch.cat([h, skip], dim=1), emb_BE, context)
        out: Tensor = self.out(h)
        return out
