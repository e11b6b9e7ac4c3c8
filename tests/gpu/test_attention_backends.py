"""Attention backends on a CUDA device, forward and backward. A backend that is missing is a failure."""

from __future__ import annotations

import pytest
import torch

from msdiff_dist.errors import ConfigError
from msdiff_dist.models.attention import attention
from msdiff_dist.models.unet_config import AttentionBackend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "xformers"])
@pytest.mark.parametrize("tokens", [16, 256, 4096])
@pytest.mark.parametrize("head_channels", [32, 64, 256, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_with_the_definition_in_double(
    backend: AttentionBackend, tokens: int, head_channels: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randn(2, 3, tokens, head_channels, generator=generator, device="cuda").to(dtype)

    inputs, grad = [draw() for _ in range(3)], draw()
    if backend == "xformers" and not _operator_exists(head_channels, dtype):
        with pytest.raises(ConfigError, match=r"too new|> 256"):
            attention(inputs[0], inputs[1], inputs[2], backend)
        return
    results = _with_gradients(inputs, grad, backend)
    exact = _with_gradients([x.double() for x in inputs], grad.double(), "math")
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    for result, reference in zip(results, exact, strict=True):
        assert (result - reference).norm() <= tolerance * reference.norm()


def _with_gradients(inputs: list[torch.Tensor], grad: torch.Tensor, backend: AttentionBackend) -> list[torch.Tensor]:
    """The output, and the gradients of q, k and v, in double."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    out = attention(q, k, v, backend)
    assert out.dtype == inputs[0].dtype
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, (q, k, v), grad))]


def _operator_exists(head_channels: int, dtype: torch.dtype) -> bool:
    """xformers' general kernel ends with compute capability 9.0; its other one takes bf16 and heads of up to 256."""
    return torch.cuda.get_device_capability() <= (9, 0) or (dtype == torch.bfloat16 and head_channels <= 256)
