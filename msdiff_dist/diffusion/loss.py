"""The loss of each sample before weighting."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

LossKind = Literal["l2", "l1"]


def sample_losses(output: Tensor, target: Tensor, kind: LossKind = "l2") -> Tensor:
    """Mean squared (`l2`) or absolute (`l1`) error of each sample [n, ...] over its entries, float32 [n]."""
    error = (output.float() - target.float()).flatten(1)
    return error.square().mean(1) if kind == "l2" else error.abs().mean(1)
