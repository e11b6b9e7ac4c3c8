"""Which kernels a process chooses, and that they compute the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from msdiff_dist.distributed.kernels import choose_kernels, mkl_leaves_half_idle, multiply_by_onednn


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def cpuinfo(vendor: str, flags: str) -> str:
    cpu = f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: a CPU\nflags\t\t: fpu sse2 {flags}\n\n"
    return cpu + cpu.replace("processor\t: 0", "processor\t: 1")


@pytest.mark.parametrize(
    ("vendor", "flags", "idle"),
    [
        ("AuthenticAMD", "avx2 avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
        ("AuthenticAMD", "avx2 avx512f amx_bf16", False),
        ("GenuineIntel", "avx2 avx512f", False),
    ],
)
def test_onednn_is_for_amd_with_wide_vectors_and_without_matrix_units(vendor: str, flags: str, idle: bool) -> None:
    assert mkl_leaves_half_idle(cpuinfo(vendor, flags)) is idle


def test_a_system_that_lists_no_cpu_keeps_its_kernels() -> None:
    assert not mkl_leaves_half_idle("")


@pytest.mark.parametrize("shape", [(64, 64, 64), (2048, 128, 384), (8, 1000, 3)])
def test_products_stay_those_of_float32(shape: tuple[int, int, int]) -> None:
    """On any CPU, also one on which oneDNN would round: there nothing may change."""
    multiply_by_onednn()
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(shape[0], shape[1], generator=g), torch.randn(shape[1], shape[2], generator=g)
    exact = a.double() @ b.double()
    assert (a @ b - exact).norm() <= 1e-6 * exact.norm()


def test_tf32_is_as_asked() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    try:
        for tf32 in (True, False):
            choose_kernels(torch.device("cuda"), tf32)
            assert torch.backends.cudnn.allow_tf32 is tf32
            assert (torch.get_float32_matmul_precision() == "highest") is not tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before
