"""Attention through every backend of the device, forward and backward, against the same in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from msdiff_dist.apps.check.exactness import exact_fp32, relative_error
from msdiff_dist.apps.check.findings import Bench, Finding
from msdiff_dist.models.attention import attention
from msdiff_dist.models.unet_config import AttentionBackend

GROUP = "operators"
# Relative errors of a whole tensor. bf16 keeps 8 bits, and both the logits' and the output's rounding add up.
_LIMITS = {torch.float32: {"output": 1e-5, "gradients": 2e-5}, torch.bfloat16: {"output": 1e-2, "gradients": 3e-2}}
_HEAD_CHANNELS, _TOKENS = (32, 64, 128, 256, 512), (16, 64, 256, 1024, 4096)
_SMALL_HEAD_CHANNELS, _SMALL_TOKENS = (32, 64), (16, 256)


def operators(bench: Bench) -> Iterator[Finding]:
    """One finding for each backend, precision and head size: the worst over the numbers of tokens."""
    backends: list[AttentionBackend] = ["math", "sdpa", "auto", *(["xformers"] if bench.on_gpu else [])]  # type: ignore[list-item]
    heads = _SMALL_HEAD_CHANNELS if bench.small else _HEAD_CHANNELS
    tokens = _SMALL_TOKENS if bench.small else _TOKENS
    for D in heads:
        for dtype, limits in _LIMITS.items():
            exact = {T: _outcome(_inputs(T, D, dtype), "math", torch.float64, torch.device("cpu")) for T in tokens}
            for backend in backends:
                errors = dict.fromkeys(limits, 0.0)
                for T in tokens:
                    found = _outcome(_inputs(T, D, dtype), backend, dtype, bench.device)
                    for key, error in zip(errors, map(relative_error, found, exact[T]), strict=True):
                        errors[key] = max(errors[key], error)
                kind = f"{backend}, {str(dtype).removeprefix('torch.')}"
                name = f"{kind}, {D} channels a head, {tokens[0]}-{tokens[-1]} tokens"
                yield Finding.within(GROUP, name, errors, limits)


def _inputs(T: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, [2, 2, T, D], as the network makes them: heads are a strided view."""
    generator = torch.Generator().manual_seed(T * D)
    return [torch.randn(2, T, 2, D, generator=generator).to(dtype).transpose(1, 2) for _ in range(4)]


def _outcome(
    inputs: list[Tensor], backend: AttentionBackend, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The output and the gradients of q, k and v in a row, both float64 on the CPU."""
    q, k, v, gradient = (x.to(device, dtype) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with exact_fp32():
        out = attention(leaves[0], leaves[1], leaves[2], backend)
        gradients = torch.autograd.grad(out, leaves, gradient)
    return out.detach().double().cpu(), torch.stack([g.double().cpu() for g in gradients])
