"""The encoder of family `ldm`: time and class embedding, first convolution, down path, middle block."""

from __future__ import annotations

from torch import Tensor, nn

from msdiff_dist.models.ldm.blocks import Downsample, ResBlock, UNetBlock, attention_block, timestep_embedding
from msdiff_dist.models.ldm.config import LDMConfig


class Encoder(nn.Module):
    """Maps noisy latents to the features that every decoder reads.

    Args:
        stage: the stage that selects the width, where each stage has an encoder of its own.
    """

    def __init__(self, config: LDMConfig, stage: int = 0) -> None:
        super().__init__()
        self.config = config
        self.width = config.encoder_width(stage)
        emb_channels = config.emb_channels(stage)
        self.time_embed = nn.Sequential(
            nn.Linear(self.width, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if config.num_classes is not None:
            label_channels = config.context_dim if config.class_conditioning == "context" else emb_channels
            assert label_channels is not None
            # The last row stands for a dropped label, for classifier-free guidance.
            self.label_emb = nn.Embedding(config.num_classes + 1, label_channels)

        self.input_blocks = nn.ModuleList([UNetBlock(nn.Conv2d(config.in_channels, self.width, 3, padding=1))])
        blocks = config.down_blocks(stage)
        for block in blocks:
            if not block.resamples:
                layers: list[nn.Module] = [ResBlock(config, block.in_channels, emb_channels, block.out_channels)]
                if block.downsampling in config.attention_downsamples:
                    layers.append(attention_block(config, block.out_channels))
            elif config.resblock_updown:
                layers = [ResBlock(config, block.in_channels, emb_channels, block.out_channels, resample="down")]
            else:
                layers = [Downsample(block.in_channels)]
            self.input_blocks.append(UNetBlock(*layers))

        channels = blocks[-1].out_channels
        self.middle_block = UNetBlock(
            ResBlock(config, channels, emb_channels, channels),
            attention_block(config, channels),
            ResBlock(config, channels, emb_channels, channels),
        )

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        context: Tensor | None = None,
        label: Tensor | None = None,
        augment: None = None,
    ) -> tuple[Tensor, ...]:
        """Features for a decoder: (h, emb, [context,] *skips), all batch first; the highest resolution's skip is first.

        Args:
            x_BCHW: the network's image input (c_in x_t).
            t_B: the network's time input (c_noise), integer or float.
            context: tokens [B, S, context_dim], where the model takes them.
            label: int64 [B], where the model takes labels; `num_classes` stands for a dropped label.
            augment: never given; other families take it.

        Raises:
            ConfigError: the conditions are not those that the model takes.
        """
        self.config.check_conditions(context, label, augment)
        dtype = next(self.parameters()).dtype
        emb_BE = self.time_embed(timestep_embedding(t_B, self.width).to(dtype))
        if label is not None:
            if self.config.class_conditioning == "embedding":
                emb_BE = emb_BE + self.label_emb(label)
            else:
                context = self.label_emb(label)[:, None, :]
        context = None if context is None else context.to(dtype)

        h = x_BCHW.to(dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb_BE, context)
            skips.append(h)
        h = self.middle_block(h, emb_BE, context)
        return (h, emb_BE, *skips) if context is None else (h, emb_BE, context, *skips)
