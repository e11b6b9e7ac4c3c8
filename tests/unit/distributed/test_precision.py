from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from msdiff_dist.distributed.precision import (
    Bf16Support,
    agree_on_precision,
    bf16_support,
    choose_precision,
    cpu_multiplies_bf16,
    emulation_factor,
    expected_precision,
)

CPU = torch.device("cpu")
NATIVE, EMULATED = Bf16Support(True, "this CPU"), Bf16Support(False, "this CPU")


def cpuinfo(flags: str, name: str = "flags\t\t") -> str:
    """Two CPUs as Linux lists them."""
    one = f"processor\t: 0\nmodel name\t: some\n{name}: {flags}\nvmx flags\t: bf16\nbogomips\t: 4800.00\n\n"
    return one * 2


@pytest.mark.parametrize(
    ("listing", "environment", "native"),
    [
        (cpuinfo("fpu avx2 fma"), {}, False),  # Zen 3
        (cpuinfo("avx2 avx512f avx512vl avx512_vnni"), {}, False),  # Cascade Lake: oneDNN takes bf16 and emulates it
        (cpuinfo("avx512f avx512_bf16 avx512_vp2intersect"), {}, True),
        (cpuinfo("avx512f amx_bf16 amx_tile"), {}, True),
        (cpuinfo("fp asimd bf16", name="Features\t"), {}, True),
        (cpuinfo("fp asimd", name="Features\t"), {}, False),
        ("", {}, False),  # no /proc
        (cpuinfo("avx512_bf16"), {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        (cpuinfo("avx512_bf16"), {"ONEDNN_MAX_CPU_ISA": "avx512_core"}, False),
        (cpuinfo("avx512_bf16"), {"DNNL_MAX_CPU_ISA": "AVX2"}, False),
        (cpuinfo("avx512_bf16"), {"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"}, True),
        (cpuinfo("avx512_bf16"), {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        (cpuinfo("avx512_bf16"), {"ONEDNN_MAX_CPU_ISA": "no such value"}, True),
        (cpuinfo("avx512_bf16"), {"ATEN_CPU_CAPABILITY": "avx2"}, True),
    ],
)
def test_a_cpu_multiplies_bf16(listing: str, environment: dict[str, str], native: bool) -> None:
    assert cpu_multiplies_bf16(listing, environment) == native


def test_a_limit_of_onednn_is_seen() -> None:
    """Whatever the CPU has. In a process of its own, since oneDNN reads the variable once."""
    code = "import torch, msdiff_dist.distributed.precision as p; print(p.bf16_support(torch.device('cpu')))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert printed.stdout.strip() == "this CPU computes bf16 by emulation"


@pytest.mark.parametrize(
    ("asked", "support_W", "stored", "precision", "why"),
    [
        ("auto", [NATIVE] * 2, None, "bf16", "this CPU computes bf16 natively"),
        ("auto", [EMULATED] * 2, None, "fp32", "this CPU computes bf16 by emulation"),
        ("auto", [NATIVE, EMULATED, NATIVE], None, "fp32", "bf16 is computed by emulation on rank 1"),
        ("auto", [EMULATED, NATIVE, EMULATED], None, "fp32", "bf16 is computed by emulation on ranks 0, 2"),
        ("auto", [EMULATED], "bf16", "bf16", "as the run began"),
        ("auto", [NATIVE], "fp32", "fp32", "as the run began"),
        ("auto", [NATIVE], "auto", "bf16", "this CPU computes bf16 natively"),  # written before its first start
        ("fp32", [NATIVE], "bf16", "fp32", "as the recipe asks"),
        ("bf16", [EMULATED], None, "bf16", "as the recipe asks"),
    ],
)
def test_the_choice_fits_every_rank_unless_the_run_has_one(
    asked: str, support_W: list[Bf16Support], stored: str | None, precision: str, why: str
) -> None:
    assert choose_precision(asked, support_W, stored) == (precision, why)


def test_many_ranks_are_not_all_named() -> None:
    _, why = choose_precision("auto", [NATIVE, *[EMULATED] * 100], None)
    assert why == "bf16 is computed by emulation on ranks 1, 2, 3, 4, 5, 6, 7, 8, ..."


def test_this_machine() -> None:
    native = bf16_support(CPU).native
    assert ("natively" in str(bf16_support(CPU))) == native
    assert expected_precision("auto", on_gpus=False) == ("bf16" if native else "fp32")
    assert expected_precision("auto", on_gpus=True) == "bf16"
    assert (agree_on_precision("bf16", CPU, None).warning is None) == native
    assert agree_on_precision("fp32", CPU, None).warning is None
    assert emulation_factor(CPU) > 0
