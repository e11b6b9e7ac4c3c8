"""Checks of the Triton kernels of GroupNorm in Triton's interpreter, on CPU tensors.

A program of its own, because Triton reads TRITON_INTERPRET when it is imported. It prints one line a case and ends
with an error at the first that does not agree with float64.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import interpreter

from msdiff_dist.models.group_norm_triton import FusedGroupNorm

_patch_tensor = interpreter._patch_lang_tensor


def patch_tensor(tensor: Any, scope: Any) -> None:
    """What the interpreter does to Triton's tensors, and bounds of loops that numpy 2.4 takes too.

    Triton 3.6 makes them of arrays [1] by `int`, which numpy now refuses for all but arrays without dimensions.
    """
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = patch_tensor

# (shape, groups): groups of 7 channels as in LDM's width 224, several blocks of channels, several chunks of pixels,
# pixels that fill no block, and single pixels.
SHAPES = [((2, 14, 4, 4), 2), ((1, 72, 5, 3), 4), ((2, 4, 36, 30), 2), ((3, 6, 1, 1), 1)]


def expected(x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """The definition, by torch's operators."""
    h = F.group_norm(x, groups, eps=eps)
    over = (slice(None), slice(None), None, None) if scale.ndim == 2 else (slice(None), None, None)
    h = h * scale[over] + shift[over]
    return F.silu(h) if silu else h


def check(
    shape: tuple[int, ...], groups: int, layout: torch.memory_format, dtype: torch.dtype, per_sample: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    affine = shape[:2] if per_sample else shape[1:2]
    silu = not per_sample or groups == 4
    # A mean far from zero: the difference of two large sums would lose its digits here.
    mean = 30.0 if dtype == torch.float32 else 1.0
    values = [torch.randn(shape, generator=generator) + mean, *(torch.randn(affine, generator=generator) for _ in "ab")]
    grad = torch.randn(shape, generator=generator).to(dtype)
    ours = [v.to(dtype).requires_grad_() for v in values]
    ours[0] = ours[0].detach().contiguous(memory_format=layout).requires_grad_()
    exact = [v.detach().double().requires_grad_() for v in ours]
    out = FusedGroupNorm.apply(*ours, groups, 1e-5, silu)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout), "the output is in another memory format"
    out.backward(grad)
    reference = expected(*exact, groups, 1e-5, silu)
    reference.backward(grad.double())
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    pairs = [(out, reference), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    for name, (a, b) in zip(("output", "x", "scale", "shift"), pairs, strict=True):
        assert a is not None
        assert b is not None
        error = float((a.detach().double() - b.detach()).norm() / b.detach().norm())
        assert error <= tolerance, f"{name} of {shape} in {groups} groups, {layout}, {dtype}: {error:.1e}"
    assert ours[0].grad is not None
    assert ours[0].grad.is_contiguous(memory_format=layout)
    print(shape, groups, layout, dtype, "silu" if silu else "", "per sample" if per_sample else "")


if __name__ == "__main__":
    for (shape, groups), layout, dtype in itertools.product(
        SHAPES, (torch.channels_last, torch.contiguous_format), (torch.float32, torch.bfloat16)
    ):
        for per_sample in (False, True):
            check(shape, groups, layout, dtype, per_sample)
