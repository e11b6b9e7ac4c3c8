"""GroupNorm kernels, memory formats and compiled parts on a CUDA device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from msdiff_dist.distributed.kernels import choose_kernels
from msdiff_dist.models import LDMConfig, build_model
from msdiff_dist.models.compilation import compile_part
from msdiff_dist.models.group_norm import group_norm, kernels_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = LDMConfig(
    encoder_channels=64,
    decoder_channels=(64,),
    channel_mult=(1, 2, 3),
    num_res_blocks=1,
    attention_downsamples=(4, 2),
    num_head_channels=32,
)


def test_the_kernels_run() -> None:
    assert kernels_run(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(4, 224, 64, 64), (3, 448, 32, 32), (2, 896, 8, 8), (2, 96, 7, 5)], ids=str)
def test_group_norm_agrees_with_float64(
    dtype: torch.dtype, layout: torch.memory_format, shape: tuple[int, ...]
) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    x = (torch.randn(shape, generator=g, device="cuda") + 2).to(dtype).contiguous(memory_format=layout)
    x.requires_grad_()
    affine = [torch.randn(shape[1], generator=g, device="cuda").to(dtype).requires_grad_() for _ in range(2)]
    grad = torch.randn(shape, generator=g, device="cuda").to(dtype)
    out = group_norm(x, 32, *affine, silu=True)
    out.backward(grad)
    assert out.is_contiguous(memory_format=layout)
    exact = [v.detach().double().requires_grad_() for v in (x, *affine)]
    expected = F.silu(F.group_norm(exact[0], 32, exact[1], exact[2]))
    expected.backward(grad.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip((x, *affine), exact, strict=True))]
    for a, b in pairs:
        assert a is not None
        assert b is not None
        assert (a.detach().double() - b.detach()).norm() <= tolerance * b.detach().norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_no_activation_leaves_channels_last(compiled: bool) -> None:
    """Features and output keep the format of the input, and fp32 without TF32 agrees with the CPU."""
    choose_kernels(torch.device("cuda"), tf32=False)
    model = build_model(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([5, 800])
    expected = model.stages[0](*model.shared(x, t)).detach()
    model.cuda()
    if compiled:
        compile_part(model.shared)
        compile_part(model.stages[0])
    features = model.shared(x.cuda().contiguous(memory_format=torch.channels_last), t.cuda())
    output = model.stages[0](*features)
    images = [f for f in (*features, output) if f.ndim == 4]
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in images)
    assert (output.cpu() - expected).norm() <= 1e-4 * expected.norm()


def test_eager_step_transposes_no_activation() -> None:
    """No kernel of a step changes the memory format of an activation; cuDNN names these kernels after both formats."""
    choose_kernels(torch.device("cuda"), tf32=False)
    model = build_model(CONFIG).to("cuda", torch.bfloat16)
    x = torch.randn(4, 3, 64, 64, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    t = torch.tensor([5, 800, 3, 9], device="cuda")

    def step() -> None:
        model.stages[0](*model.shared(x, t)).float().square().mean().backward()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    names = [event.key for event in profile.key_averages()]
    assert not [name for name in names if "nchwToNhwc" in name or "nhwcToNchw" in name], names
