"""Recompute activations in the backward pass instead of keeping them, separately for encoder and decoders."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from msdiff_dist.models.families import FAMILIES


@dataclass(frozen=True, kw_only=True)
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

    families = list(dict.fromkeys(FAMILIES.values()))
    kinds = [family.encoder for family in families] if config.encoder else []
    kinds += [family.decoder for family in families] if config.decoders else []
    chosen = [module for module in part.modules() if isinstance(module, tuple(kinds))]
    for module in chosen:
        for block in module.modules():
            if any(family.recomputed(block) for family in families):
                checkpoint_wrapper(block, offload_to_cpu=config.offload_to_cpu)
