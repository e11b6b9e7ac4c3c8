"""Settings of this process that decide with which kernels torch computes."""

from __future__ import annotations

import torch

from msdiff_dist.distributed.cpuinfo import cpuinfo


def choose_kernels(device: torch.device, tf32: bool) -> None:
    """Set, for this process, what makes the kernels on `device` fast without changing what they compute.

    Args:
        tf32: whether GPUs may round the factors of float32 products and convolutions to TF32's 10 bits of mantissa.
    """
    if device.type == "cuda":
        # A rank's shapes are the same in every micro batch, so the measured algorithm serves the whole run.
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    elif mkl_leaves_half_idle(cpuinfo()):
        multiply_by_onednn()


def mkl_leaves_half_idle(cpuinfo: str) -> bool:
    """Whether MKL uses vectors of 256 bits on a CPU that has 512, as it does on those that are not Intel's.

    CPUs with matrix units (AMX) do not count: there `multiply_by_onednn` would round the factors.

    Args:
        cpuinfo: text of /proc/cpuinfo.
    """
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    named = {name.strip(): value.split() for name, value in fields.items()}
    flags = set(named.get("flags", []))
    has_amx = any(flag.startswith("amx") for flag in flags)
    return named.get("vendor_id") == ["AuthenticAMD"] and "avx512f" in flags and not has_amx


def multiply_by_onednn() -> None:
    """Have oneDNN, not MKL, multiply float32 matrices, if it does so in float32 here.

    Torch takes oneDNN only where lower precision is allowed ("medium"). Without AMX, oneDNN has no kernel of lower
    precision for these products and computes them in float32. Whether that holds is tried: otherwise nothing changes.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(128, 128, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision("medium")
    error = float((a @ b - exact).norm() / exact.norm())
    if error > 1e-6:  # products of bfloat16 differ by 3e-3, those of TF32 by 4e-4
        torch.set_float32_matmul_precision("highest")
