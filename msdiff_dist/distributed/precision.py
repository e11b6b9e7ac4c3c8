"""Which precision fits a device: bf16 where it is computed natively, fp32 elsewhere.

A CPU without bf16 instructions emulates them, an order of magnitude slower than fp32. So `train.precision: auto`
chooses by device, and a run that computes by emulation prints a warning.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]

# x86 names of the instructions by which oneDNN multiplies bf16 numbers, and the Arm one.
_NATIVE_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True, kw_only=True)
class PrecisionChoice:
    """What a run computes in.

    Attributes:
        precision: of forward and backward passes.
        why: reason in words, to be printed in parentheses after it.
        warning: how slow it is on this device; None where it is computed natively.
    """

    precision: Precision
    why: str
    warning: str | None = None


def choose_precision(asked: Literal["auto"] | Precision, device: torch.device, stored: str | None) -> PrecisionChoice:
    """The precision of a run on `device`.

    Args:
        asked: `train.precision` of the recipe.
        stored: the precision of the run so far, which `auto` keeps; None for a new run.
    """
    native, description = native_bf16(device)
    if asked != "auto":
        precision, why = asked, "as the recipe asks"
    elif stored in ("fp32", "bf16"):
        precision, why = ("bf16" if stored == "bf16" else "fp32"), "as the run began"
    else:
        precision, why = ("bf16" if native else "fp32"), description
    if precision == "fp32" or native:
        return PrecisionChoice(precision=precision, why=why)
    factor = emulation_factor()
    warning = f"{description}: a convolution in bf16 takes {factor:.0f} times as long as in fp32 here"
    return PrecisionChoice(precision=precision, why=why, warning=warning)


def expected_precision(asked: Literal["auto"] | Precision, on_gpus: bool) -> Precision:
    """What `choose_precision` will choose for a new run on GPUs, assumed to have bf16, or on CPUs like this one."""
    if asked != "auto":
        return asked
    return "bf16" if on_gpus or native_bf16(torch.device("cpu"))[0] else "fp32"


def native_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether `device` computes bf16 natively, and a sentence that says so."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return native, f"this GPU computes bf16 {'natively' if native else 'by emulation'}"
    native = bool(_cpu_flags() & _NATIVE_FLAGS)
    return native, f"this CPU computes bf16 {'natively' if native else 'by emulation'}"


def _cpu_flags() -> set[str]:
    """Instruction sets of the first CPU; none where the system does not list them."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def emulation_factor() -> float:
    """How many times longer a small convolution takes in bf16 than in fp32 on this CPU, measured in about a second."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(8, 32, 16, 16, dtype=dtype)
        layer = torch.nn.Conv2d(32, 32, 3, padding=1).to(dtype)
        layer(x)  # the first call also chooses and prepares a kernel
        start = time.perf_counter()
        rounds = 0
        while rounds < 3 or time.perf_counter() - start < 0.1:
            layer(x)
            rounds += 1
        seconds[dtype] = (time.perf_counter() - start) / rounds
    return seconds[torch.bfloat16] / seconds[torch.float32]
