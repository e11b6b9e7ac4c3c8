"""Which precision fits the devices of a run: bf16 where all compute it natively, fp32 elsewhere.

A device without instructions that multiply bf16 numbers emulates them. On CPUs whose vectors have 512 bits that takes
a few times as long as fp32, on others tens of times. So `train.precision: auto` chooses by what the devices have, and a
run that computes by emulation all the same, since it began elsewhere, prints what that costs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from msdiff_dist.distributed.agree import combined
from msdiff_dist.distributed.cpuinfo import cpuinfo

Precision = Literal["fp32", "bf16"]

# Instructions that multiply bf16 numbers, as Linux lists them: two of x86, and Arm's.
_NATIVE_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
# Values of ONEDNN_MAX_CPU_ISA under which oneDNN does not use them.
_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


@dataclass(frozen=True)
class Bf16Support:
    """Whether a device computes bf16 natively, and `device`, the words for it: "this CPU", "this GPU"."""

    native: bool
    device: str

    def __str__(self) -> str:
        return f"{self.device} computes bf16 {'natively' if self.native else 'by emulation'}"


@dataclass(frozen=True, kw_only=True)
class PrecisionChoice:
    """What a run computes in.

    Attributes:
        precision: of forward and backward passes.
        why: reason in words, to be printed in parentheses after it.
        warning: which ranks compute it by emulation, and how slowly; None where all compute it natively.
    """

    precision: Precision
    why: str
    warning: str | None = None


def agree_on_precision(asked: Literal["auto"] | Precision, device: torch.device, stored: str | None) -> PrecisionChoice:
    """The precision of a run on the devices of all ranks, the same on every rank. Collective.

    Args:
        asked: `train.precision` of the recipe.
        device: of this rank.
        stored: the precision of the run so far, the same on every rank; None for a new run.
    """
    own = bf16_support(device)
    precision, why, where = combined(own, lambda every: (*choose_precision(asked, every, stored), _emulation(every)))
    if precision == "fp32" or where is None:
        return PrecisionChoice(precision=precision, why=why)
    factor = combined(1.0 if own.native else emulation_factor(device), max)
    warning = f"{where}: a convolution takes {factor:.1f} times as long as in fp32"
    return PrecisionChoice(precision=precision, why=why, warning=warning)


def choose_precision(
    asked: Literal["auto"] | Precision, support_W: Sequence[Bf16Support], stored: str | None
) -> tuple[Precision, str]:
    """What `agree_on_precision` chooses, and why in words.

    All ranks wait for the slowest in every step, so one device that emulates bf16 decides for fp32.

    Args:
        support_W: of the device of each rank.
    """
    if asked != "auto":
        return asked, "as the recipe asks"
    if stored in ("fp32", "bf16"):
        return ("bf16" if stored == "bf16" else "fp32"), "as the run began"
    emulating = [rank for rank, support in enumerate(support_W) if not support.native]
    if not emulating or len(emulating) == len(support_W):
        return ("fp32" if emulating else "bf16"), str(support_W[0])
    return "fp32", _on_ranks(emulating)


def _emulation(support_W: Sequence[Bf16Support]) -> str | None:
    """Where bf16 is computed by emulation, in words; None if nowhere."""
    emulating = [rank for rank, support in enumerate(support_W) if not support.native]
    if not emulating:
        return None
    return str(support_W[0]) if len(emulating) == len(support_W) else _on_ranks(emulating)


def _on_ranks(emulating: Sequence[int]) -> str:
    shown = ", ".join(map(str, emulating[:8])) + (", ..." if len(emulating) > 8 else "")
    return f"bf16 is computed by emulation on {'rank' if len(emulating) == 1 else 'ranks'} {shown}"


def expected_precision(asked: Literal["auto"] | Precision, on_gpus: bool) -> Precision:
    """What will be chosen for a new run on GPUs, assumed to have bf16, or on CPUs like this one."""
    support = Bf16Support(True, "a GPU") if on_gpus else bf16_support(torch.device("cpu"))
    return choose_precision(asked, [support], None)[0]


def bf16_support(device: torch.device) -> Bf16Support:
    """Whether `device` computes bf16 natively."""
    if device.type == "cuda":
        return Bf16Support(torch.cuda.get_device_capability(device) >= (8, 0), "this GPU")
    # Torch knows whether it was built with oneDNN and may use its bf16; oneDNN also accepts CPUs on which it emulates.
    usable = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return Bf16Support(usable and cpu_multiplies_bf16(cpuinfo(), os.environ), "this CPU")


def cpu_multiplies_bf16(cpuinfo: str, environment: Mapping[str, str]) -> bool:
    """Whether a CPU has instructions that multiply bf16 numbers, and oneDNN may use them.

    ATEN_CPU_CAPABILITY does not matter: it limits torch's own kernels, and convolutions and matrix products are
    oneDNN's.

    Args:
        cpuinfo: text of /proc/cpuinfo.
        environment: variables of the process; ONEDNN_MAX_CPU_ISA limits oneDNN, DNNL_MAX_CPU_ISA where that is not set.
    """
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    flags = next((value.split() for name, _, value in lines if name.strip() in ("flags", "Features")), [])
    limit = environment.get("ONEDNN_MAX_CPU_ISA", environment.get("DNNL_MAX_CPU_ISA", ""))
    return not _NATIVE_FLAGS.isdisjoint(flags) and limit.upper() not in _WITHOUT_BF16


def emulation_factor(device: torch.device) -> float:
    """How many times longer a small convolution takes in bf16 than in fp32, forward and backward, measured."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(8, 32, 16, 16, dtype=dtype, device=device)
        layer = torch.nn.Conv2d(32, 32, 3, padding=1, dtype=dtype, device=device)

        def once(x: torch.Tensor = x, layer: torch.nn.Conv2d = layer) -> None:
            layer(x).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        once()  # the first call also chooses and prepares a kernel
        start = time.perf_counter()
        rounds = 0
        while rounds < 3 or time.perf_counter() - start < 0.1:
            once()
            rounds += 1
        seconds[dtype] = (time.perf_counter() - start) / rounds
    return seconds[torch.bfloat16] / seconds[torch.float32]
