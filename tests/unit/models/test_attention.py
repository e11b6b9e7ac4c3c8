"""Attention against its definition, and the two blocks that use it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msdiff_dist.models.attention import SelfAttentionBlock, SpatialTransformer, attention
from msdiff_dist.models.unet_config import AttentionBackend


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The definition, one query at a time, in float64."""
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                scores = [float(q[b, h, t].double() @ k[b, h, s].double()) for s in range(k.shape[2])]
                weights = [math.exp(x / math.sqrt(q.shape[-1])) for x in scores]
                out[b, h, t] = sum(w * v[b, h, s].double() for s, w in enumerate(weights)) / sum(weights)
    return out


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, 5) for _ in range(4)), st.integers(1, 9)),
    backend=st.sampled_from(["auto", "sdpa", "math"]),
    strided=st.booleans(),
)
def test_backends_follow_the_definition(
    sizes: tuple[int, int, int, int, int], backend: AttentionBackend, strided: bool
) -> None:
    B, H, T, S, D = sizes
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, n, D, generator=g) for n in (T, S, S))
    if strided:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(attention(q, k, v, backend).double(), naive_attention(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [16, 300])
def test_backends_agree_with_gradients(dtype: torch.dtype, tokens: int) -> None:
    def run(backend: AttentionBackend) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 2, tokens, 8, generator=g).to(dtype).requires_grad_() for _ in range(3))
        out = attention(q, k, v, backend)
        assert out.dtype == dtype
        out.float().square().sum().backward()
        return [out.detach(), q.grad, k.grad, v.grad]  # type: ignore[list-item]

    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    results = {b: run(b) for b in ("auto", "sdpa", "math")}  # type: ignore[arg-type]
    for name in ("sdpa", "math"):
        for a, b in zip(results["auto"], results[name], strict=True):
            assert (a - b).norm() <= tolerance * b.norm()


def test_legacy_order_splits_heads_before_qkv() -> None:
    """The two orders are the same attention with the rows of the qkv projection permuted."""
    channels, heads = 12, 3
    legacy = SelfAttentionBlock(channels, heads, norm_groups=4, backend="math", legacy_order=True)
    new = SelfAttentionBlock(channels, heads, norm_groups=4, backend="math", legacy_order=False)
    torch.nn.init.normal_(legacy.proj_out.weight)
    new.load_state_dict(legacy.state_dict())
    x = torch.randn(2, channels, 3, 5)
    assert not torch.allclose(new(x), legacy(x))
    for name in ("weight", "bias"):
        rows = getattr(legacy.qkv, name).detach()
        getattr(new.qkv, name).data = rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()
    torch.testing.assert_close(new(x), legacy(x))


def test_self_attention_does_not_know_the_order_of_pixels() -> None:
    block = SelfAttentionBlock(8, 2, norm_groups=2, backend="auto", legacy_order=True)
    torch.nn.init.normal_(block.proj_out.weight)
    x, order = torch.randn(2, 8, 4, 4), torch.randperm(16)
    shuffled = x.flatten(2)[:, :, order].unflatten(2, (4, 4))
    torch.testing.assert_close(block(shuffled), block(x).flatten(2)[:, :, order].unflatten(2, (4, 4)))


def test_linear_and_convolution_projections_are_the_same_map() -> None:
    by_convolution, by_linear = (
        SpatialTransformer(8, 2, 2, "math", context_dim=6, depth=2, linear_projections=linear)
        for linear in (False, True)
    )
    torch.nn.init.normal_(by_convolution.proj_out.weight)
    weights = by_convolution.state_dict()
    by_linear.load_state_dict({n: w.flatten(1) if w.dim() == 4 else w for n, w in weights.items()})
    x, context = torch.randn(2, 8, 4, 4), torch.randn(2, 3, 6)
    torch.testing.assert_close(by_linear(x, context), by_convolution(x, context))
    assert not torch.allclose(by_linear(x, context), by_linear(x, context.roll(1, 0)))


@pytest.mark.parametrize(
    ("dtype", "keys", "chosen"),
    [(torch.bfloat16, 64, "math"), (torch.bfloat16, 300, "sdpa"), (torch.float32, 64, "sdpa")],
)
def test_short_sequences_in_bf16_are_computed_by_plain_products_on_cpus(
    dtype: torch.dtype, keys: int, chosen: AttentionBackend
) -> None:
    """The backends round differently, so their results tell which one it was."""
    q, k, v = torch.randn(3, 4, 2, keys, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    backends: tuple[AttentionBackend, ...] = ("math", "sdpa")
    same = [backend for backend in backends if torch.equal(attention(q, k, v), attention(q, k, v, backend))]
    assert same == [chosen]
