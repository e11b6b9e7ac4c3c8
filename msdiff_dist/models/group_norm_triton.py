"""GroupNorm (1803.08494) with a following SiLU as Triton kernels, in the memory format of the input.

cuDNN's convolutions are fastest on channels-last tensors. PyTorch's CUDA GroupNorm takes and returns contiguous ones,
so that every norm would cost two transpositions. These kernels read and write either format, compute the statistics in
float32, and fuse the activation into the norm.

A norm over [B, C, H, W] takes three launches, forward and backward alike: sums over chunks of the pixels for every
channel, sums over the channels of every group, and the result for every element. Means and squared deviations are
merged as by Chan et al. (1983), so a mean far from zero costs no digits. Sums are in an order that does not vary from
run to run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a chunk: enough chunks for the multiprocessors of a GPU, few enough that their sums are cheap to add.
_PIXELS = 1024


@triton.jit
def _chunk_moments(
    x_ptr, mean_ptr, square_ptr, C, P, stride_b, stride_c, stride_p, chunk,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Mean and sum of squared deviations of every channel over one chunk of the pixels, to [B, chunks, C]."""
    b, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = k * chunk, tl.minimum((k + 1) * chunk, P)
    base = x_ptr + b * stride_b + c[:, None] * stride_c
    sums = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < last)[None, :]
        sums += tl.load(base + p[None, :] * stride_p, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(sums, 1) / (last - first)
    squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(first, last, BLOCK_P):  # the chunk is still in the cache
        p = start + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < last)[None, :]
        x = tl.load(base + p[None, :] * stride_p, mask=inside, other=0.0).to(tl.float32)
        squares += tl.where(inside, (x - mean[:, None]) * (x - mean[:, None]), 0.0)
    at = (b * tl.num_programs(1) + k) * C + c
    tl.store(mean_ptr + at, mean, mask=c < C)
    tl.store(square_ptr + at, tl.sum(squares, 1), mask=c < C)


@triton.jit
def _group_moments(
    mean_ptr, square_ptr, group_mean_ptr, group_rstd_ptr, C, P, group, chunks, chunk, total, eps,
    BLOCK: tl.constexpr
):  # fmt: skip
    """Mean and inverse standard deviation of one group of one sample, from the moments of its channels and chunks."""
    b, g = tl.program_id(0), tl.program_id(1)
    base = b * chunks * C + g * group
    mean, square = 0.0, 0.0
    for start in range(0, chunks * group, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < chunks * group
        k = i // group
        count = tl.where(inside, tl.minimum(chunk, P - k * chunk), 0).to(tl.float32)
        mean += tl.sum(count * tl.load(mean_ptr + base + k * C + i % group, mask=inside, other=0.0)) / total
    for start in range(0, chunks * group, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < chunks * group
        k = i // group
        count = tl.where(inside, tl.minimum(chunk, P - k * chunk), 0).to(tl.float32)
        deviation = tl.load(mean_ptr + base + k * C + i % group, mask=inside, other=0.0) - mean
        square += tl.sum(tl.load(square_ptr + base + k * C + i % group, mask=inside, other=0.0))
        square += tl.sum(count * deviation * deviation)
    at = b * tl.num_programs(1) + g
    tl.store(group_mean_ptr + at, mean)
    tl.store(group_rstd_ptr + at, 1.0 / tl.sqrt(square / total + eps))


@triton.jit
def _normalise(
    x_ptr, out_ptr, mean_ptr, rstd_ptr, scale_ptr, shift_ptr, C, P, groups, stride_b, stride_c, stride_p, affine_b,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """z = scale (x - mean) rstd + shift, and z sigmoid(z) with SILU."""
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (c < C)[:, None] & (p < P)[None, :]
    group_at = b * groups + c // (C // groups)
    mean = tl.load(mean_ptr + group_at, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group_at, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + b * affine_b + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * affine_b + c, mask=c < C, other=0.0).to(tl.float32)
    at = b * stride_b + c[:, None] * stride_c + p[None, :] * stride_p
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z = (x - mean[:, None]) * (rstd * scale)[:, None] + shift[:, None]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(out_ptr + at, z.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_at(x, grad, mean, rstd, scale, shift, SILU: tl.constexpr):
    """(gradient of z, normalised x) of elements, from the gradient of the output."""
    normal = (x - mean[:, None]) * rstd[:, None]
    if SILU:
        z = normal * scale[:, None] + shift[:, None]
        s = tl.sigmoid(z)
        grad = grad * s * (1.0 + z * (1.0 - s))
    return grad, normal


@triton.jit
def _chunk_gradients(
    x_ptr, grad_ptr, mean_ptr, rstd_ptr, scale_ptr, shift_ptr, dscale_ptr, dshift_ptr, C, P, groups,
    stride_b, stride_c, stride_p, affine_b, chunk,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Gradients of scale and shift of every channel, summed over one chunk of the pixels, to [B, chunks, C]."""
    b, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = k * chunk, tl.minimum((k + 1) * chunk, P)
    group_at = b * groups + c // (C // groups)
    mean = tl.load(mean_ptr + group_at, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group_at, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + b * affine_b + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * affine_b + c, mask=c < C, other=0.0).to(tl.float32)
    dscale = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    dshift = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < last)[None, :]
        at = b * stride_b + c[:, None] * stride_c + p[None, :] * stride_p
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)  # zero outside, and so are the sums there
        dz, normal = _gradient_at(x, grad, mean, rstd, scale, shift, SILU)
        dscale += dz * normal
        dshift += dz
    at_sum = (b * tl.num_programs(1) + k) * C + c
    tl.store(dscale_ptr + at_sum, tl.sum(dscale, 1), mask=c < C)
    tl.store(dshift_ptr + at_sum, tl.sum(dshift, 1), mask=c < C)


@triton.jit
def _group_gradients(
    chunk_dscale_ptr, chunk_dshift_ptr, scale_ptr, dscale_ptr, dshift_ptr, along_ptr, across_ptr,
    C, group, chunks, total, affine_b,
    BLOCK: tl.constexpr
):  # fmt: skip
    """Sum the chunks of one group's channels, and their two means that the gradient of x needs."""
    b, g = tl.program_id(0), tl.program_id(1)
    along, across = 0.0, 0.0
    for start in range(0, group, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < group
        c = g * group + i
        dscale = tl.zeros([BLOCK], tl.float32)
        dshift = tl.zeros([BLOCK], tl.float32)
        for k in range(0, chunks):
            at = (b * chunks + k) * C + c
            dscale += tl.load(chunk_dscale_ptr + at, mask=inside, other=0.0)
            dshift += tl.load(chunk_dshift_ptr + at, mask=inside, other=0.0)
        tl.store(dscale_ptr + b * C + c, dscale, mask=inside)
        tl.store(dshift_ptr + b * C + c, dshift, mask=inside)
        scale = tl.load(scale_ptr + b * affine_b + c, mask=inside, other=0.0).to(tl.float32)
        along += tl.sum(scale * dscale)
        across += tl.sum(scale * dshift)
    at_group = b * tl.num_programs(1) + g
    tl.store(along_ptr + at_group, along / total)
    tl.store(across_ptr + at_group, across / total)


@triton.jit
def _gradient(
    x_ptr, grad_ptr, dx_ptr, mean_ptr, rstd_ptr, scale_ptr, shift_ptr, along_ptr, across_ptr, C, P, groups,
    stride_b, stride_c, stride_p, affine_b,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """dx = rstd (scale dz - mean(scale dz) - n mean(scale dz n)), with means over the group and n the normalised x."""
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (c < C)[:, None] & (p < P)[None, :]
    group_at = b * groups + c // (C // groups)
    mean = tl.load(mean_ptr + group_at, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group_at, mask=c < C, other=0.0)
    along = tl.load(along_ptr + group_at, mask=c < C, other=0.0)
    across = tl.load(across_ptr + group_at, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + b * affine_b + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * affine_b + c, mask=c < C, other=0.0).to(tl.float32)
    at = b * stride_b + c[:, None] * stride_c + p[None, :] * stride_p
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dz, normal = _gradient_at(x, grad, mean, rstd, scale, shift, SILU)
    dx = rstd[:, None] * (scale[:, None] * dz - across[:, None] - normal * along[:, None])
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


class FusedGroupNorm(torch.autograd.Function):
    """`apply(x, scale, shift, groups, eps, silu)`; see `msdiff_dist.models.group_norm.group_norm`.

    `scale` and `shift` are [C], or [B, C] with values of their own for each sample.
    """

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        x_BCHW = _dense(x_BCHW)
        scale, shift = scale.contiguous(), shift.contiguous()
        B, C, H, W = x_BCHW.shape
        layout = _Layout(x_BCHW)
        means, squares = (x_BCHW.new_empty(B, layout.chunks, C, dtype=torch.float32) for _ in range(2))
        mean, rstd = (x_BCHW.new_empty(B, groups, dtype=torch.float32) for _ in range(2))
        out = torch.empty_like(x_BCHW)
        _chunk_moments[layout.by_chunk](
            x_BCHW, means, squares, C, H * W, *layout.strides, layout.chunk, **layout.blocks
        )
        group = C // groups
        _group_moments[(B, groups)](
            means, squares, mean, rstd, C, H * W, group, layout.chunks, layout.chunk, float(group * H * W), eps,
            BLOCK=_power_of_two(layout.chunks * group, 1024)
        )  # fmt: skip
        affine_b = C if scale.ndim == 2 else 0
        _normalise[layout.by_block](
            x_BCHW, out, mean, rstd, scale, shift, C, H * W, groups, *layout.strides, affine_b,
            SILU=silu, **layout.blocks
        )  # fmt: skip
        ctx.save_for_backward(x_BCHW, scale, shift, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x_BCHW, scale, shift, mean, rstd = ctx.saved_tensors
        B, C, H, W = x_BCHW.shape
        layout = _Layout(x_BCHW)
        grad = _like(grad_outputs[0], x_BCHW)
        sums = [x_BCHW.new_empty(B, layout.chunks, C, dtype=torch.float32) for _ in range(2)]
        dscale, dshift = (x_BCHW.new_empty(B, C, dtype=torch.float32) for _ in range(2))
        along, across = torch.empty_like(mean), torch.empty_like(mean)
        dx = torch.empty_like(x_BCHW)
        affine_b = C if scale.ndim == 2 else 0
        _chunk_gradients[layout.by_chunk](
            x_BCHW, grad, mean, rstd, scale, shift, *sums, C, H * W, ctx.groups, *layout.strides, affine_b,
            layout.chunk, SILU=ctx.silu, **layout.blocks
        )  # fmt: skip
        group = C // ctx.groups
        _group_gradients[(B, ctx.groups)](
            *sums, scale, dscale, dshift, along, across, C, group, layout.chunks, float(group * H * W), affine_b,
            BLOCK=_power_of_two(group, 256)
        )  # fmt: skip
        _gradient[layout.by_block](
            x_BCHW, grad, dx, mean, rstd, scale, shift, along, across, C, H * W, ctx.groups, *layout.strides, affine_b,
            SILU=ctx.silu, **layout.blocks
        )  # fmt: skip
        if scale.ndim == 1:
            dscale, dshift = dscale.sum(0), dshift.sum(0)
        return dx, dscale.to(scale.dtype), dshift.to(shift.dtype), None, None, None


class _Layout:
    """How the kernels walk over a tensor [B, C, H, W]: strides, blocks and grids.

    Attributes:
        strides: of samples, channels and pixels.
        blocks: sizes of the tile that a program holds; its longer side is the contiguous one.
        chunk, chunks: pixels that are summed by one program, and how many such chunks there are.
        by_chunk, by_block: grids over (samples, chunks or blocks of pixels, blocks of channels).
    """

    def __init__(self, x_BCHW: Tensor) -> None:
        B, C, H, W = x_BCHW.shape
        pixels = H * W
        channels_last = _is_channels_last(x_BCHW)
        self.strides = (C * pixels, 1, C) if channels_last else (C * pixels, pixels, 1)
        most = (32, 64) if channels_last else (256, 8)
        block_p, block_c = _power_of_two(pixels, most[0]), _power_of_two(C, most[1])
        self.blocks = {"BLOCK_P": block_p, "BLOCK_C": block_c}
        self.chunk = min(_PIXELS, block_p * -(-pixels // block_p))
        self.chunks = -(-pixels // self.chunk)
        channel_blocks = -(-C // block_c)
        self.by_chunk = (B, self.chunks, channel_blocks)
        self.by_block = (B, -(-pixels // block_p), channel_blocks)


def _power_of_two(n: int, most: int) -> int:
    """The power of two from n on, or `most`, which is one, if that is less."""
    return min(most, 1 << (n - 1).bit_length())


def _dense(x_BCHW: Tensor) -> Tensor:
    """The tensor itself if it is contiguous in either format, else a contiguous copy."""
    return x_BCHW if _is_channels_last(x_BCHW) or x_BCHW.is_contiguous() else x_BCHW.contiguous()


def _like(grad_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """The gradient in the memory format of `x_BCHW`."""
    return grad_BCHW.contiguous(
        memory_format=torch.channels_last if _is_channels_last(x_BCHW) else torch.contiguous_format
    )


def _is_channels_last(x_BCHW: Tensor) -> bool:
    return x_BCHW.is_contiguous(memory_format=torch.channels_last)
