"""GroupNorm with SiLU against its definition; its Triton kernels in the interpreter and through the compiler."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from msdiff_dist.models.group_norm import GroupNorm

# Arguments that multiples of 16 are passed for, as they are with the widths and sizes of real models.
DIVISIBLE = ("C", "P", "chunk", "x_ptr", "grad_ptr", "stride_b", "stride_c", "stride_p")
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this build of torch has no Triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("modulated", [False, True])
def test_follows_the_definition(dtype: torch.dtype, layout: torch.memory_format, modulated: bool) -> None:
    g = torch.Generator().manual_seed(0)
    norm = GroupNorm(3, 12, silu=True)
    for p in norm.parameters():
        torch.nn.init.normal_(p, generator=g)
    norm.to(dtype)
    x = (3 * torch.randn(2, 12, 5, 4, generator=g) + 1).to(dtype).contiguous(memory_format=layout).requires_grad_()
    conditions = [torch.randn(2, 12, generator=g).to(dtype) for _ in range(2)] if modulated else []
    out = norm(x, *conditions)
    out.float().sin().sum().backward()

    exact = x.detach().double().requires_grad_()
    grouped = exact.unflatten(1, (3, 4))
    centred = grouped - grouped.mean((2, 3, 4), keepdim=True)
    h = (centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()).flatten(1, 2)
    h = h * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    if modulated:
        scale, shift = (c.double()[:, :, None, None] for c in conditions)
        h = h * (1 + scale) + shift
    expected = F.silu(h)
    expected.sin().sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert x.grad is not None
    assert exact.grad is not None
    for a, b in ((out, expected), (x.grad, exact.grad)):
        assert (a.detach().double() - b.detach()).norm() <= tolerance * b.detach().norm()


def test_channels_last_stays() -> None:
    x = torch.randn(2, 12, 5, 4).contiguous(memory_format=torch.channels_last)
    assert GroupNorm(3, 12)(x).is_contiguous(memory_format=torch.channels_last)


@TRITON
def test_kernels_agree_with_float64_in_the_interpreter() -> None:
    """Forward and backward, both memory formats, float32 and bfloat16."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.models.interpreted_group_norm"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 32


@TRITON
@pytest.mark.parametrize("channels_last", [True, False])
def test_kernels_compile_for_a_gpu_with_wide_loads(channels_last: bool) -> None:
    """Triton compiles without a GPU. Reading 16 bytes at once is what makes a kernel fit its memory format."""
    from msdiff_dist.models import group_norm_triton as kernels

    tile = {"BLOCK_P": 32, "BLOCK_C": 64} if channels_last else {"BLOCK_P": 256, "BLOCK_C": 8}
    for name in ("_chunk_moments", "_normalise", "_chunk_gradients", "_gradient"):
        kernel = getattr(kernels, name)
        constants = tile | ({"SILU": True} if "SILU" in kernel.arg_names else {})
        assert "ld.global.v4.b32" in compiled(kernel, constants, "stride_c" if channels_last else "stride_p"), name
    for name, block in (("_group_moments", 512), ("_group_gradients", 8)):
        compiled(getattr(kernels, name), {"BLOCK": block}, "")


def compiled(kernel: Any, constants: dict[str, Any], contiguous: str) -> str:
    """PTX of a kernel for bfloat16 tensors on an sm_90 GPU.

    Args:
        contiguous: the stride that is 1.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, values, divisible = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name == contiguous:
            types[name], values[(i,)] = "constexpr", constants.get(name, 1)
        elif name.endswith("_ptr"):
            types[name] = "*bf16" if re.fullmatch("(x|out|grad|dx|scale|shift)_ptr", name) else "*fp32"
        else:
            types[name] = "fp32" if name in ("eps", "total") else "i32"
        if types[name] != "constexpr" and name in DIVISIBLE:
            divisible[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, values, divisible)
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
