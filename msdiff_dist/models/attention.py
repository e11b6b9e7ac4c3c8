"""Attention (1706.03762): one function with interchangeable backends, and the blocks of both families that use it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdiff_dist.models.group_norm import GroupNorm
from msdiff_dist.models.unet_config import AttentionBackend
from msdiff_dist.models.xformers_attention import check_operators, xformers_attention

Module = TypeVar("Module", bound=nn.Module)


def attention(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, backend: AttentionBackend = "auto") -> Tensor:
    """softmax(q k^T / sqrt(D)) v of each head, [B, H, T, D].

    Args:
        backend: `auto` takes `math` for few keys on a CPU, in bfloat16, and in float32 where oneDNN multiplies float32
            matrices (`distributed.kernels`); otherwise `sdpa`.

    Raises:
        ConfigError: the installed xformers has no operator for these inputs.
    """
    if backend == "auto":
        backend = _fastest(q_BHTD, k_BHSD)
    if backend == "sdpa":
        if q_BHTD.device.type == "cpu":  # strided inputs would make SDPA leave its fused kernel there
            q_BHTD, k_BHSD, v_BHSD = q_BHTD.contiguous(), k_BHSD.contiguous(), v_BHSD.contiguous()
        return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD)
    if backend == "xformers":
        return xformers_attention(q_BHTD, k_BHSD, v_BHSD)
    # Scaling q before the product keeps the logits of half-precision inputs in range.
    logits_BHTS = (q_BHTD * q_BHTD.shape[-1] ** -0.5) @ k_BHSD.transpose(-2, -1)
    at_least_fp32 = torch.promote_types(logits_BHTS.dtype, torch.float32)
    out: Tensor = logits_BHTS.softmax(dim=-1, dtype=at_least_fp32).to(v_BHSD.dtype) @ v_BHSD
    return out


def _fastest(q_BHTD: Tensor, k_BHSD: Tensor) -> AttentionBackend:
    # With oneDNN's products torch's fused CPU kernel calls it six times, forward and backward, for every head of every
    # sample; `math` calls it once for all of them. With short sequences the calls take longer than their products.
    # With MKL's products the fused kernel makes no such calls, and at 16 to 4096 keys it was as fast or faster with
    # AVX2 and with AVX-512.
    if q_BHTD.device.type != "cpu":
        return "sdpa"
    if q_BHTD.dtype == torch.bfloat16:
        return "math" if k_BHSD.shape[-2] < 256 else "sdpa"
    return "math" if k_BHSD.shape[-2] <= 256 and _onednn_multiplies() else "sdpa"


# The compiler cannot follow the call, and would break the graph in two here.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _onednn_multiplies() -> bool:
    """Whether oneDNN, not MKL, multiplies float32 matrices on this CPU."""
    return torch.get_float32_matmul_precision() == "medium"


def check_attention(parts: Iterable[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """Check that the backend of every attention layer in `parts` can compute in `dtype` on `device`.

    Raises:
        ConfigError: a layer asks for xformers, and the installed one cannot.
    """
    layers = (m for part in parts for m in part.modules() if isinstance(m, SelfAttentionBlock | MultiHeadAttention))
    if head_sizes := {layer.head_channels for layer in layers if layer.backend == "xformers"}:
        check_operators(sorted(head_sizes), dtype, device)


class SelfAttentionBlock(nn.Module):
    """x + projection of multi-head self-attention over the pixels of GroupNorm(x).

    Args:
        legacy_order: how the 3 C outputs of `qkv` are divided: True, first into heads and then into q, k and v, as in
            the published checkpoints of LDM; False, first into q, k and v.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        norm_groups: int,
        backend: AttentionBackend,
        legacy_order: bool,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_channels, self.backend = num_heads, channels // num_heads, backend
        self.legacy_order = legacy_order
        self.norm = GroupNorm(norm_groups, channels, eps=eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        qkv_BTF = self.qkv(_to_tokens(self.norm(x_BCHW)))  # F = 3 C
        if self.legacy_order:
            q, k, v = qkv_BTF.view(B, H * W, self.num_heads, 3, -1).transpose(1, 2).unbind(3)
        else:
            q, k, v = qkv_BTF.view(B, H * W, 3, self.num_heads, -1).transpose(1, 3).unbind(2)
        out_BTC = attention(q, k, v, self.backend).transpose(1, 2).reshape(B, H * W, C)
        return x_BCHW + _to_image(self.proj_out(out_BTC), H, W)


class SpatialTransformer(nn.Module):
    """x + projection of `depth` transformer layers over the pixels that attend to the context (2112.10752, Sec. 3.3).

    Args:
        linear_projections: `proj_in` and `proj_out` are linear layers over tokens instead of 1x1 convolutions. The two
            are the same map, but their weights have different shapes in published checkpoints.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        norm_groups: int,
        backend: AttentionBackend,
        context_dim: int,
        depth: int,
        linear_projections: bool,
    ) -> None:
        super().__init__()
        self.linear_projections = linear_projections
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projections else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerLayer(channels, num_heads, context_dim, backend) for _ in range(depth)
        )
        self.proj_out = zero_init(
            nn.Linear(channels, channels) if linear_projections else nn.Conv2d(channels, channels, 1)
        )

    def forward(self, x_BCHW: Tensor, context_BSE: Tensor) -> Tensor:
        H, W = x_BCHW.shape[-2:]
        h = self.norm(x_BCHW)
        h_BTC = self.proj_in(_to_tokens(h)) if self.linear_projections else _to_tokens(self.proj_in(h))
        for layer in self.transformer_blocks:
            h_BTC = layer(h_BTC, context_BSE)
        if self.linear_projections:
            return x_BCHW + _to_image(self.proj_out(h_BTC), H, W)
        out: Tensor = x_BCHW + self.proj_out(_to_image(h_BTC, H, W))
        return out


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention to the context and a gated feed-forward layer, each pre-normed and residual."""

    def __init__(self, channels: int, num_heads: int, context_dim: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.attn1 = MultiHeadAttention(channels, channels, num_heads, backend)
        self.ff = FeedForward(channels)
        self.attn2 = MultiHeadAttention(channels, context_dim, num_heads, backend)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x_BTC: Tensor, context_BSE: Tensor) -> Tensor:
        h_BTC = self.norm1(x_BTC)
        x_BTC = x_BTC + self.attn1(h_BTC, h_BTC)
        x_BTC = x_BTC + self.attn2(self.norm2(x_BTC), context_BSE)
        out: Tensor = x_BTC + self.ff(self.norm3(x_BTC))
        return out


class MultiHeadAttention(nn.Module):
    """Multi-head attention with queries from x, keys and values from the context, and an output projection."""

    def __init__(self, channels: int, context_dim: int, num_heads: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.num_heads, self.head_channels, self.backend = num_heads, channels // num_heads, backend
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x_BTC: Tensor, context_BSE: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y in (self.to_q(x_BTC), self.to_k(context_BSE), self.to_v(context_BSE))
        )
        out: Tensor = self.to_out(attention(q, k, v, self.backend).transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """A gated linear layer to four times the width, and a linear layer back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Published checkpoints name the layers `net.0.proj` and `net.2`; place 1 is their dropout, unused here.
        self.net = nn.Sequential(GatedGELU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x_BTC: Tensor) -> Tensor:
        out: Tensor = self.net(x_BTC)
        return out


class GatedGELU(nn.Module):
    """GEGLU (2002.05202): one half of a linear layer's output times the GELU of the other."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC, gate_BTC = self.proj(x_BTC).chunk(2, dim=-1)
        return x_BTC * F.gelu(gate_BTC)


def zero_init(module: Module) -> Module:
    """Set all parameters of a layer to zero and return it. A residual branch that ends in it starts as zero."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def _to_tokens(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.flatten(2).transpose(1, 2)


def _to_image(x_BTC: Tensor, H: int, W: int) -> Tensor:
    out: Tensor = x_BTC.transpose(1, 2).unflatten(2, (H, W))
    return out
