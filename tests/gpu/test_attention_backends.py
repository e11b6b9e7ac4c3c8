"""Attention backends on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from msdiff_dist.errors import ConfigError
from msdiff_dist.models.attention import attention
from msdiff_dist.models.unet_config import AttentionBackend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "xformers"])
@pytest.mark.parametrize("tokens", [16, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_with_math(backend: AttentionBackend, tokens: int, dtype: torch.dtype) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 7, tokens, 32, generator=g, device="cuda").to(dtype) for _ in range(3))
    try:
        out = attention(q, k, v, backend)
    except ConfigError as e:
        pytest.skip(str(e))
    exact = attention(q.double(), k.double(), v.double(), "math")
    assert (out - exact).norm() <= (1e-3 if dtype == torch.float32 else 2e-2) * exact.norm()
