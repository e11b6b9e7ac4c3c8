"""GroupNorm (1803.08494), with an optional SiLU, that keeps channels-last tensors as they are."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(
    x_BCHW: Tensor, groups: int, scale: Tensor, shift: Tensor, eps: float = 1e-5, silu: bool = False
) -> Tensor:
    """Normalise every group of channels of every sample, scale and shift each channel, then apply SiLU if `silu`.

    Statistics are float32, also of bfloat16 inputs.

    Args:
        x_BCHW: contiguous or channels last. The output has the same memory format, but on a CPU in bfloat16, where it
            is contiguous.
        scale, shift: [C], or [B, C] where each sample has values of its own.
    """
    # The compiler fuses plain operators itself, and keeps their memory format.
    if x_BCHW.is_cuda and not torch.compiler.is_compiling() and kernels_run(x_BCHW.device):
        # Imported here: Triton is in the CUDA builds of torch only, and reads its settings when it is imported.
        from msdiff_dist.models.group_norm_triton import FusedGroupNorm

        out: Tensor = FusedGroupNorm.apply(x_BCHW, scale, shift, groups, eps, silu)
        return out
    return _plain(x_BCHW, groups, scale, shift, eps, silu)


@functools.cache
def kernels_run(device: torch.device) -> bool:
    """Whether the Triton kernels run on a GPU, tried once. If not, a warning gives the reason."""
    # Triton compiles them, and a launcher in C, on the machine: that takes a C compiler and Python's headers, which
    # nodes of a cluster may lack.
    x = torch.ones(1, 2, 2, 2, device=device, requires_grad=True)
    affine = torch.ones(2, device=device)
    try:
        from msdiff_dist.models.group_norm_triton import FusedGroupNorm

        FusedGroupNorm.apply(x, affine, affine, 1, 1e-5, True).sum().backward()
    except Exception as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[-1]
        warnings.warn(f"GroupNorm runs without its Triton kernels, which is slower: {reason}", stacklevel=2)
        return False
    return True


def _plain(x_BCHW: Tensor, groups: int, scale: Tensor, shift: Tensor, eps: float, silu: bool) -> Tensor:
    if x_BCHW.device.type == "cpu" and x_BCHW.dtype == torch.bfloat16:
        # Of bfloat16 in channels last, torch's CPU kernel was measured to take up to forty times as long.
        x_BCHW = x_BCHW.contiguous()
    if scale.ndim == 1:
        h = F.group_norm(x_BCHW, groups, scale, shift, eps)
    else:
        h = torch.addcmul(shift[:, :, None, None], F.group_norm(x_BCHW, groups, eps=eps), scale[:, :, None, None])
    return F.silu(h) if silu else h


class GroupNorm(nn.GroupNorm):
    """torch's module, computed by `group_norm`.

    Args:
        silu: whether SiLU follows.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, silu: bool = False) -> None:
        super().__init__(num_groups, num_channels, eps=eps)
        self.silu = silu

    def forward(self, x_BCHW: Tensor, scale_BC: Tensor | None = None, shift_BC: Tensor | None = None) -> Tensor:
        """The norm, times (1 + scale) plus shift where these are given: adaptive group normalisation (2105.05233)."""
        scale: Tensor = self.weight
        shift: Tensor = self.bias
        if scale_BC is not None and shift_BC is not None:
            scale, shift = scale * (1 + scale_BC), torch.addcmul(shift_BC, shift, 1 + scale_BC)
        return group_norm(x_BCHW, self.num_groups, scale, shift, self.eps, self.silu)
