"""Recompute activations in the backward pass instead of keeping them, separately for encoder and decoders."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from msdiff_dist.models.ldm.blocks import ResBlock, UNetBlock
from msdiff_dist.models.ldm.decoder import Decoder
from msdiff_dist.models.ldm.encoder import Encoder
from msdiff_dist.models.song.blocks import SongBlock
from msdiff_dist.models.song.decoder import SongDecoder
from msdiff_dist.models.song.encoder import SongEncoder

_ENCODERS, _DECODERS = [Encoder, SongEncoder], [Decoder, SongDecoder]


@dataclass(frozen=True)
class ActivationCheckpointingConfig:
    """Which parts trade computation for memory: they keep the inputs of their blocks only."""

    encoder: bool = False
    """The encoder keeps only the inputs of each block for the backward pass, and computes the rest again."""
    decoders: bool = False
    """The decoders do so."""
    offload_to_cpu: bool = False
    """Keep those inputs in host memory."""


def checkpoint_activations(part: nn.Module, config: ActivationCheckpointingConfig) -> None:
    """Wrap, in place, the residual blocks (with their attention) of every encoder and decoder in `part` as asked.

    Parameter names stay as they are. The backward pass must be `.backward()`: `torch.autograd.grad` refuses to run
    through re-entrant checkpoints.
    """
    from fairscale.nn import checkpoint_wrapper

    kinds = [*_ENCODERS] if config.encoder else []
    kinds += _DECODERS if config.decoders else []
    chosen = [module for module in part.modules() if isinstance(module, tuple(kinds))]
    for module in chosen:
        for block in module.modules():
            # A lone convolution keeps nothing but its input anyway.
            if isinstance(block, SongBlock) or (isinstance(block, UNetBlock) and isinstance(block[0], ResBlock)):
                checkpoint_wrapper(block, offload_to_cpu=config.offload_to_cpu)
