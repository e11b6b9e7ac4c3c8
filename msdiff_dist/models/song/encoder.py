"""The encoder of DDPM++ and NCSN++: time embedding, first convolution, down path, and the middle where it is shared."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from msdiff_dist.models.song.blocks import PyramidStep, SongBlock, TimeFrequencies, conv, initialised, middle_block
from msdiff_dist.models.song.config import SongConfig


class SongEncoder(nn.Module):
    """Maps noisy images to the features that every decoder reads.

    Args:
        stage: the stage that selects the width, where each stage has an encoder of its own.
    """

    def __init__(self, config: SongConfig, stage: int = 0) -> None:
        super().__init__()
        self.config = config
        width, emb_channels = config.encoder_width(stage), config.emb_channels(stage)
        time_channels = 2 * width if config.variant.embedding == "fourier" else width
        self.frequencies = TimeFrequencies(config.variant.embedding, time_channels)
        self.time_embed = nn.Sequential(
            initialised(nn.Linear(time_channels, emb_channels)),
            nn.SiLU(),
            initialised(nn.Linear(emb_channels, emb_channels)),
            nn.SiLU(),
        )
        if config.num_classes is not None:
            self.label_emb = initialised(nn.Linear(config.num_classes, time_channels))
        if config.augment_labels:
            self.augment_emb = initialised(nn.Linear(config.augment_labels, time_channels, bias=False))

        self.conv_in = conv(config.in_channels, width)
        self.input_blocks, self.pyramid = nn.ModuleList(), nn.ModuleList()
        self._blocks, image_channels = config.down_blocks(stage), config.in_channels
        for block in self._blocks:
            widths = block.in_channels, block.out_channels, emb_channels
            if not block.resamples:
                attention = block.downsampling in config.attention_downsamples
                self.input_blocks.append(SongBlock(config, *widths, attention=attention))
                continue
            self.input_blocks.append(SongBlock(config, *widths, resample="down"))
            if config.variant.input_pyramid:
                self.pyramid.append(PyramidStep(config, image_channels, block.out_channels))
                image_channels = block.out_channels
        if config.variant.shared_middle:
            self.middle_block = middle_block(config, self._blocks[-1].out_channels, emb_channels)

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        context: None = None,
        label: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Features for a decoder: (emb, *skips[, h]), all batch first; h is there where the middle is shared.

        Args:
            x_BCHW: the network's image input (c_in x_t).
            t_B: the network's time input (c_noise).
            context: never given; other families take it.
            label: int64 [B], where the model takes labels; `num_classes` stands for a dropped label.
            augment: [B, augment_labels], how each sample was augmented; None: not at all.

        Raises:
            ConfigError: the conditions are not those that the model takes.
        """
        self.config.check_conditions(context, label, augment)
        emb_BE = self._embedding(t_B, label, augment)
        image = x_BCHW.to(emb_BE.dtype)
        h = self.conv_in(image)
        skips, pyramid = [h], iter(self.pyramid)
        for block, module in zip(self._blocks, self.input_blocks, strict=True):
            h = module(h, emb_BE)
            if block.resamples and self.pyramid:
                h = image = next(pyramid)(image, h)
            skips.append(h)
        if self.config.variant.shared_middle:
            return (emb_BE, *skips, self.middle_block(h, emb_BE))
        return (emb_BE, *skips)

    def _embedding(self, t_B: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        dtype = next(self.parameters()).dtype
        emb_BE = self.frequencies(t_B).to(dtype)
        if label is not None:
            classes = self.label_emb.in_features
            # A dropped label becomes all zeros. The square root gives the other rows a mean square of one.
            one_hot = F.one_hot(label, classes + 1)[:, :classes].to(dtype)
            emb_BE = emb_BE + self.label_emb(one_hot * math.sqrt(classes))
        if augment is not None:
            emb_BE = emb_BE + self.augment_emb(augment.to(dtype))
        out: Tensor = self.time_embed(emb_BE)
        return out
