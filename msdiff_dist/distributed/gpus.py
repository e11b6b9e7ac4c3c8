"""GPUs that a plan can be made for: memory, speeds and links, and how much of these a training reaches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from msdiff_dist.distributed.precision import Precision
from msdiff_dist.errors import ConfigError, did_you_mean

GIB, PETA, TERA, GIGA, MICRO = 2**30, 1e15, 1e12, 1e9, 1e-6


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and its links, by the numbers of the maker's data sheet.

    The efficiencies and times below the data sheet's numbers are assumptions, to be replaced by measured ones.

    Attributes:
        name: what the user calls it.
        memory: GiB that programs can allocate.
        tflops: dense bf16 matrix products, TFLOP/s, accumulated in fp32; 0: the GPU has no bf16.
        tf32_tflops: dense TF32 matrix products, where a recipe allows them.
        fp32_tflops: fp32 arithmetic.
        bandwidth: of memory, GB/s.
        link: GB/s of one GPU to the others of its node, one direction.
        network: GB/s of one GPU to other nodes, one direction: its share of the node's network cards.
        reserved: GiB that a process needs besides its tensors: CUDA's context, libraries' workspaces, NCCL's buffers.
        fragmentation: share of the memory that torch's allocator cannot use.
        compute_efficiency: share of the peak that matrix products and convolutions reach.
        bandwidth_efficiency: share of the memory bandwidth that other operators reach.
        link_efficiency: share of links and network that collectives reach.
        kernel_us: microseconds by which a kernel takes longer than its work, for start and end.
        dispatch_us: microseconds of the host for an operator: forward, backward and launch.
        hop_us: microseconds of latency of each step round a ring of ranks.
    """

    name: str
    memory: float
    tflops: float
    tf32_tflops: float
    fp32_tflops: float
    bandwidth: float
    link: float
    network: float
    reserved: float = 1.5
    fragmentation: float = 0.05
    compute_efficiency: float = 0.65
    bandwidth_efficiency: float = 0.85
    link_efficiency: float = 0.8
    kernel_us: float = 2.0
    dispatch_us: float = 10.0
    hop_us: float = 6.0

    @property
    def usable_bytes(self) -> int:
        """Bytes for tensors."""
        return int((self.memory * (1 - self.fragmentation) - self.reserved) * GIB)

    def matrix_flops(self, precision: Precision, tf32: bool) -> float:
        """Floating-point operations a second of matrix products and convolutions at their peak.

        Args:
            tf32: whether those of fp32 factors are rounded to TF32.
        """
        if precision == "bf16":
            return self.tflops * TERA
        return max(self.fp32_tflops, self.tf32_tflops if tf32 else 0.0) * TERA


def _gpu(
    name: str, memory: float, tflops: tuple[float, float, float], bandwidth: float, links: tuple[float, float]
) -> Gpu:
    bf16, tf32, fp32 = tflops
    link, network = links
    return Gpu(
        name=name, memory=memory, tflops=bf16, tf32_tflops=tf32, fp32_tflops=fp32, bandwidth=bandwidth, link=link,
        network=network,
    )  # fmt: skip


# Memory: what torch reports of such a card. Speeds: NVIDIA's data sheets, without sparsity. Links: NVLink of the SXM
# modules, PCIe 4.0 of the others (half of it for GeForce cards, which have no peer access). Network: one card of 400
# Gb/s for each Hopper or Blackwell GPU, 200 for Ampere and Ada data-centre cards, 100 for the others.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40g", 39.4, (312, 156, 19.5), 1555, (300, 25)),
        _gpu("a100-80g", 79.1, (312, 156, 19.5), 2039, (300, 25)),
        _gpu("b200", 178.3, (2250, 1125, 75), 8000, (900, 50)),
        _gpu("h100-80g", 79.1, (989, 494, 67), 3350, (450, 50)),
        _gpu("h200-141g", 139.8, (989, 494, 67), 4800, (450, 50)),
        _gpu("l40s", 44.4, (362, 183, 91.6), 864, (32, 25)),
        _gpu("rtx3090", 23.6, (71, 35.6, 35.6), 936, (16, 12.5)),
        _gpu("rtx4090", 23.6, (165, 82.6, 82.6), 1008, (16, 12.5)),
        _gpu("v100-32g", 31.7, (0, 0, 15.7), 900, (150, 12.5)),
    )
}

# By what the driver calls them. The speeds above are those of SXM modules, so PCIe cards of H100 and H200, which are
# slower, are not here; nor are slices of a GPU, whose names end in MIG and their size.
_DEVICE_NAMES = {
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100-PCIE-40GB": "a100-40g",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100 80GB PCIe": "a100-80g",
    "NVIDIA B200": "b200",
    "NVIDIA H100 80GB HBM3": "h100-80g",
    "NVIDIA H200": "h200-141g",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "Tesla V100-SXM2-16GB": "v100-32g",
    "Tesla V100-SXM2-32GB": "v100-32g",
}

_REQUIRED = ("memory", "bandwidth", "tflops")


def peak_petaflops(device_name: str, precision: Precision, tf32: bool) -> float | None:
    """1e15 operations a second at the peak of the GPU that the driver calls `device_name`; None: not known.

    Args:
        tf32: as in `Gpu.matrix_flops`.
    """
    gpu = GPUS.get(_DEVICE_NAMES.get(device_name, ""))
    return (gpu.matrix_flops(precision, tf32) / PETA or None) if gpu else None


def parse_gpu(text: str) -> Gpu:
    """The GPU of `--gpu`: a name of `GPUS`, numbers, or a name and numbers that replace its own.

    Numbers are `field=value` with the fields of `Gpu`, joined by commas. Without a name, memory, tflops and bandwidth
    are required; TF32 is then taken as half of bf16, fp32 as a quarter, and the links as those of a card on PCIe 4.0.

    Raises:
        ConfigError: an unknown name or field, or a number that makes no sense.
    """
    first, *others = text.split(",")
    if "=" in first:
        numbers = _numbers(text, [first, *others])
        required = [*_REQUIRED, *([] if numbers.get("tflops") else ["fp32_tflops"])]
        missing = [field for field in required if field not in numbers]
        if missing:
            raise ConfigError("--gpu", text, f"{missing[0]} is missing", f"Give a name, or {', '.join(required)}.")
        tflops = numbers["tflops"]
        defaults = {"tf32_tflops": tflops / 2, "fp32_tflops": tflops / 4, "link": 16.0, "network": 12.5}
        return Gpu(name=text, **(defaults | numbers))
    if first not in GPUS:
        remedy = f"{did_you_mean(first, GPUS)} Or give numbers: memory=24,tflops=165,bandwidth=1000."
        raise ConfigError("--gpu", first, "no GPU of this name is known", remedy)
    changes: dict[str, Any] = {"name": text} | _numbers(text, others)
    return dataclasses.replace(GPUS[first], **changes)


def _numbers(text: str, parts: list[str]) -> dict[str, float]:
    fields = {field.name for field in dataclasses.fields(Gpu)} - {"name"}
    numbers = {}
    for part in parts:
        field, _, value = part.partition("=")
        if field not in fields:
            raise ConfigError("--gpu", text, f"{field!r} is not a number of a GPU", did_you_mean(field, fields))
        try:
            numbers[field] = float(value)
        except ValueError:
            problem = f"{field} is {value!r}"
            raise ConfigError("--gpu", text, problem, "Write a number, as in memory=24.") from None
        may_be_zero = field in ("tflops", "tf32_tflops", "reserved", "fragmentation") or field.endswith("_us")
        is_share = field == "fragmentation" or field.endswith("_efficiency")
        value_ok = numbers[field] > 0 or (numbers[field] == 0 and may_be_zero)
        if not value_ok or not numbers[field] < (1.0001 if is_share else 1e9):
            wanted = "between 0 and 1" if is_share else "above 0"
            raise ConfigError("--gpu", text, f"{field} is {value}", f"Write a number {wanted}.")
    return numbers
