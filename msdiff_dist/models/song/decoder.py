"""The decoder of one stage of DDPM++ or NCSN++: middle block, unless it is shared, up path and output head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msdiff_dist.models.song.blocks import SILENT, SongBlock, SongBlocks, conv, group_norm, middle_block
from msdiff_dist.models.song.config import SongConfig


class SongDecoder(nn.Module):
    """Maps an encoder's features to the network's output at the times of one stage.

    A decoder has attention only in the last block of a level.

    Args:
        stage: selects the width.
    """

    def __init__(self, config: SongConfig, stage: int) -> None:
        super().__init__()
        self.shared_middle = config.variant.shared_middle
        emb_channels = config.emb_channels(stage)
        if not self.shared_middle:
            self.middle_block = middle_block(config, config.down_blocks(stage)[-1].out_channels, emb_channels)
        self.output_blocks = nn.ModuleList()
        blocks = config.up_blocks(stage)
        for block in blocks:
            channels = block.out_channels
            attention = block.ends_level and block.downsampling in config.attention_downsamples
            layers = [SongBlock(config, block.in_channels, channels, emb_channels, attention=attention)]
            if block.resamples:
                layers.append(SongBlock(config, channels, channels, emb_channels, resample="up"))
            self.output_blocks.append(SongBlocks(*layers))
        self.out = nn.Sequential(
            group_norm(config, blocks[-1].out_channels),
            nn.Identity(),
            conv(blocks[-1].out_channels, config.out_channels, scale=SILENT),
        )

    def forward(self, *features: Tensor) -> Tensor:
        """Output [B, out_channels, H, W] from the features of `SongEncoder.forward`: (emb, *skips[, h])."""
        # A shared middle block's output is the last feature; otherwise the middle reads the last skip.
        emb_BE, skips = features[0], features[1:]
        if self.shared_middle:
            h, skips = skips[-1], skips[:-1]
        else:
            h = self.middle_block(skips[-1], emb_BE)
        for block, skip in zip(self.output_blocks, reversed(skips), strict=True):
            h = block(torch.cat([h, skip], dim=1), emb_BE)
        out: Tensor = self.out(h)
        return out
