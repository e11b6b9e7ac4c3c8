"""Stand-ins, on any device, for modules that a GPU computes by other operators: for traces of memory and work."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from msdiff_dist.models.group_norm import GroupNorm

aten = torch.ops.aten


def compute_as_gpus_do(part: nn.Module) -> None:
    """Replace, in place, how modules compute: memory and operators become those of a GPU, values become wrong.

    GroupNorm and its SiLU become one operator that keeps its input alone; masks of dropout take one byte an element.
    """
    for module in part.modules():
        if isinstance(module, GroupNorm):
            module.forward = partial(_group_norm, norm=module)  # type: ignore[method-assign]
        # On a CPU, dropout multiplies by a mask in the precision of its input.
        elif isinstance(module, nn.Dropout) and module.p:
            module.forward = partial(_dropout, probability=module.p)  # type: ignore[method-assign]


class _FusedGroupNorm(torch.autograd.Function):
    """One operator each way."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, groups: int, eps: float, *affine: Tensor | None) -> Tensor:
        B, C, H, W = x_BCHW.shape
        out, mean, rstd = aten.native_group_norm(x_BCHW, None, None, B, C, H * W, groups, eps)
        ctx.save_for_backward(x_BCHW, mean, rstd, *affine)
        ctx.groups = groups
        normalised: Tensor = out
        return normalised

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x_BCHW, mean, rstd, *affine = ctx.saved_tensors
        B, C, H, W = x_BCHW.shape
        of_x, _, _ = aten.native_group_norm_backward(
            grad_outputs[0], x_BCHW, mean, rstd, None, B, C, H * W, ctx.groups, [True, False, False]
        )
        return (of_x, None, None, *(None if a is None else torch.empty_like(a) for a in affine))


def _group_norm(
    x_BCHW: Tensor, scale_BC: Tensor | None = None, shift_BC: Tensor | None = None, *, norm: GroupNorm
) -> Tensor:
    out: Tensor = _FusedGroupNorm.apply(x_BCHW, norm.num_groups, norm.eps, norm.weight, norm.bias, scale_BC, shift_BC)
    return out


def _dropout(x: Tensor, probability: float) -> Tensor:
    return torch.native_dropout(x, probability, True)[0]
