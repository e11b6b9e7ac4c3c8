"""Activation checkpointing (1604.06174): recompute activations in the backward pass, for encoder and decoders apart."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from msdiff_dist.models.families import FAMILIES


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointingConfig:
    """Which parts of the model trade computation for memory. They keep only the inputs of their blocks."""

    encoder: bool = False
    """The encoder keeps only the inputs of each block for the backward pass, and computes the rest again."""
    decoders: bool = False
    """Every decoder does the same with its blocks."""
    offload_to_cpu: bool = False
    """Keep those inputs in host memory."""


def checkpoint_activations(part: nn.Module, config: ActivationCheckpointingConfig) -> None:
    """Wrap, in place, the residual blocks (with their attention) of the encoders and decoders in `part`.

    Args:
        part: module that is, or holds, encoders and decoders of any family.
        config: which of the two are wrapped.

    Names of parameters do not change. The backward pass must be `.backward()`: `torch.autograd.grad` cannot run through
    fairscale's re-entrant checkpoints.
    """
    from fairscale.nn import checkpoint_wrapper

    families = list(dict.fromkeys(FAMILIES.values()))  # several names may share one entry
    kinds = [family.encoder for family in families] if config.encoder else []
    kinds += [family.decoder for family in families] if config.decoders else []
    chosen = [module for module in part.modules() if isinstance(module, tuple(kind for kind in kinds if kind))]
    for module in chosen:
        for block in module.modules():
            if any(family.recomputed(block) for family in families):
                checkpoint_wrapper(block, offload_to_cpu=config.offload_to_cpu)
