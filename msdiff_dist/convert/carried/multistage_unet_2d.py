"""A U-Net with one shared encoder and one decoder per stage of timesteps, made of diffusers' own blocks.

Needs torch and diffusers only: exported models bring a copy of this file beside their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from diffusers.utils import BaseOutput
from torch import Tensor, nn


@dataclass
class MultistageUNet2DOutput(BaseOutput):
    """Output of `MultistageUNet2DModel`."""

    sample: Tensor
    """The network's output [B, out_channels, H, W]."""


class Blocks:
    """Builds the blocks of one model from its configuration."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.temb_channels = 4 * config.conv_in_channels

    def resnet(self, in_channels: int, out_channels: int, up: bool = False, down: bool = False) -> ResnetBlock2D:
        return ResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=self.temb_channels,
            groups=self.config.norm_num_groups,
            eps=1e-5,
            dropout=self.config.dropout,
            time_embedding_norm=self.config.resnet_time_scale_shift,
            up=up,
            down=down,
        )

    def attention(self, channels: int) -> nn.Module:
        heads = self.config.num_attention_heads or channels // self.config.attention_head_dim
        if self.config.cross_attention_dim is not None:
            built: nn.Module = Transformer2DModel(
                heads,
                channels // heads,
                in_channels=channels,
                num_layers=self.config.transformer_layers_per_block,
                cross_attention_dim=self.config.cross_attention_dim,
                norm_num_groups=self.config.norm_num_groups,
                use_linear_projection=self.config.use_linear_projection,
            )
            return built
        return Attention(
            channels,
            heads=heads,
            dim_head=channels // heads,
            norm_num_groups=self.config.norm_num_groups,
            residual_connection=True,
            bias=True,
            upcast_softmax=True,
        )

    def down(self, channels: int) -> nn.Module:
        if self.config.resnet_resampling:
            return self.resnet(channels, channels, down=True)
        return Downsample2D(channels, use_conv=True, name="op")

    def up(self, channels: int) -> nn.Module:
        if self.config.resnet_resampling:
            return self.resnet(channels, channels, up=True)
        return Upsample2D(channels, use_conv=True)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if the level has it, and a change of resolution.

    Args:
        resampler: the layer that changes the resolution; None at the end of a path.
        name: "downsamplers" or "upsamplers", the name that stock diffusers networks give the resampler's list.
    """

    def __init__(
        self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], resampler: nn.Module | None, name: str
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        if resampler is not None:
            self.add_module(name, nn.ModuleList([resampler]))
        self.attends, self.resampler_name = bool(attentions), name if resampler is not None else None

    def block(self, i: int, x: Tensor, temb: Tensor, context: Tensor | None) -> Tensor:
        """Apply residual block i and its attention."""
        x = self.resnets[i](x, temb)
        return attend(self.attentions[i], x, context) if self.attends else x

    def resample(self, x: Tensor, temb: Tensor) -> Tensor:
        """Halve or double the resolution, by a convolution or inside a residual block."""
        assert self.resampler_name is not None
        layer = self.get_submodule(self.resampler_name)[0]  # type: ignore[index]
        out: Tensor = layer(x, temb) if isinstance(layer, ResnetBlock2D) else layer(x)
        return out


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, blocks: Blocks, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(blocks.resnet(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([blocks.attention(channels)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | None) -> Tensor:
        out: Tensor = self.resnets[1](attend(self.attentions[0], self.resnets[0](x, temb), context), temb)
        return out


class StageDecoder(nn.Module):
    """Up path and output layers of one stage, with widths and attention of its own.

    Args:
        skips: channels of the encoder's outputs, first to last; the up path takes them last to first.
        widths: channels of the levels, highest resolution first.
        attends: whether each level has attention.
    """

    def __init__(self, blocks: Blocks, skips: list[int], widths: tuple[int, ...], attends: tuple[bool, ...]) -> None:
        super().__init__()
        config, channels, skips = blocks.config, skips[-1], list(skips)
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            resnets: list[nn.Module] = []
            for _ in range(config.layers_per_block + 1):
                resnets.append(blocks.resnet(channels + skips.pop(), widths[i]))
                channels = widths[i]
            attentions = [blocks.attention(channels) for _ in resnets] if attends[i] else []
            self.up_blocks.append(Level(resnets, attentions, blocks.up(channels) if i > 0 else None, "upsamplers"))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-5)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | None, skips: list[Tensor]) -> Tensor:
        skips, levels = list(skips), cast(Sequence[Level], self.up_blocks)
        for level in levels:
            for i in range(len(level.resnets)):
                x = level.block(i, torch.cat([x, skips.pop()], dim=1), temb, context)
            if level.resampler_name:
                x = level.resample(x, temb)
        out: Tensor = self.conv_out(nn.functional.silu(self.conv_norm_out(x)))
        return out


class MultistageUNet2DModel(ModelMixin, ConfigMixin):
    """Denoiser whose decoder is chosen, for each sample, by its timestep.

    Args:
        conv_in_channels: width of the encoder's first convolution, a quarter of the time embedding's.
        block_out_channels: widths of the encoder's levels.
        decoder_block_out_channels: the same for each stage's decoder, stage 0 (nearest the data) first.
        down_block_attention, decoder_attention: whether each level has attention.
        stage_boundaries: inner boundaries; stage k takes timesteps in [boundary k - 1, boundary k).
        num_attention_heads, attention_head_dim: one of them; heads by number, or by channels each.
        class_embeddings_as_context: classes are the one token of context instead of part of the time embedding.
        resnet_resampling: resample inside residual blocks.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        conv_in_channels: int = 224,
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        decoder_block_out_channels: tuple[tuple[int, ...], ...] = ((224, 448, 672, 896),),
        layers_per_block: int = 2,
        down_block_attention: tuple[bool, ...] = (False, True, True, True),
        decoder_attention: tuple[tuple[bool, ...], ...] = ((False, True, True, True),),
        stage_boundaries: tuple[float, ...] = (),
        num_attention_heads: int | None = None,
        attention_head_dim: int | None = 32,
        cross_attention_dim: int | None = None,
        transformer_layers_per_block: int = 1,
        use_linear_projection: bool = False,
        num_class_embeds: int | None = None,
        class_embeddings_as_context: bool = False,
        resnet_time_scale_shift: str = "default",
        resnet_resampling: bool = False,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        blocks, width = Blocks(self.config), conv_in_channels
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, blocks.temb_channels)
        if num_class_embeds is not None:
            as_context = cross_attention_dim if class_embeddings_as_context else None
            self.class_embedding = nn.Embedding(num_class_embeds, as_context or blocks.temb_channels)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        channels, skips = width, [width]
        for i, out in enumerate(block_out_channels):
            resnets = [blocks.resnet(channels if j == 0 else out, out) for j in range(layers_per_block)]
            attentions = [blocks.attention(out) for _ in resnets] if down_block_attention[i] else []
            last = i == len(block_out_channels) - 1
            self.down_blocks.append(Level(resnets, attentions, None if last else blocks.down(out), "downsamplers"))
            # Every residual block and every halving gives a skip; the last level is not halved.
            skips += [out] * (layers_per_block if last else layers_per_block + 1)
            channels = out
        self.mid_block = MiddleBlock(blocks, channels)
        self.decoders = nn.ModuleList(
            StageDecoder(blocks, skips, tuple(widths), tuple(attends))
            for widths, attends in zip(decoder_block_out_channels, decoder_attention, strict=True)
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> MultistageUNet2DOutput | tuple[Tensor]:
        """The network's output for noisy samples [B, C, H, W]; one timestep for all, or one each, of any stages."""
        config: Any = self.config
        t_B = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])
        temb = self.time_embedding(self.time_proj(t_B).to(self.dtype))
        if class_labels is not None:
            embedded = self.class_embedding(class_labels).to(self.dtype)
            if config.class_embeddings_as_context:
                encoder_hidden_states = embedded[:, None]
            else:
                temb = temb + embedded
        context = encoder_hidden_states
        x = self.conv_in(sample)
        skips = [x]
        for level in cast(Sequence[Level], self.down_blocks):
            for i in range(len(level.resnets)):
                x = level.block(i, x, temb, context)
                skips.append(x)
            if level.resampler_name:
                x = level.resample(x, temb)
                skips.append(x)
        x = self.mid_block(x, temb, context)

        # Each decoder runs once on the rows of its stage; the argsort of all rows puts the outputs back in order.
        boundaries = torch.tensor(config.stage_boundaries, device=t_B.device, dtype=torch.float64)
        stage_B = torch.bucketize(t_B.double(), boundaries, right=True)
        stages = stage_B.unique().tolist()
        rows = [(stage_B == k).nonzero()[:, 0] for k in stages]
        outputs = [
            self.decoders[k](x[r], temb[r], None if context is None else context[r], [s[r] for s in skips])
            for k, r in zip(stages, rows, strict=True)
        ]
        out = torch.cat(outputs)[torch.cat(rows).argsort()]
        return MultistageUNet2DOutput(sample=out) if return_dict else (out,)


def attend(layer: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    """Self-attention, or a transformer that also attends to the context."""
    if isinstance(layer, Transformer2DModel):
        attended: Tensor = layer(x, encoder_hidden_states=context, return_dict=False)[0]
        return attended
    out: Tensor = layer(x)
    return out
