"""GPUs by name and by numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from msdiff_dist.distributed.gpus import GIB, GPUS, parse_gpu, peak_petaflops
from msdiff_dist.errors import ConfigError


def test_every_gpu_has_plausible_numbers() -> None:
    for name, gpu in GPUS.items():
        assert gpu.name == name == parse_gpu(name).name
        assert 0.85 * gpu.memory * GIB < gpu.usable_bytes < gpu.memory * GIB
        assert gpu.fp32_tflops < max(gpu.tflops, gpu.tf32_tflops, gpu.fp32_tflops * 1.01)
        assert gpu.network <= gpu.link
        assert gpu.matrix_flops("fp32", tf32=False) <= gpu.matrix_flops("fp32", tf32=True)


def test_peaks_by_the_names_of_the_driver() -> None:
    for name, gpu in (("NVIDIA H100 80GB HBM3", "h100-80g"), ("Tesla V100-SXM2-32GB", "v100-32g")):
        assert peak_petaflops(name, "fp32", tf32=False) == pytest.approx(GPUS[gpu].fp32_tflops / 1e3)
    assert peak_petaflops("NVIDIA A100-SXM4-40GB", "bf16", tf32=False) == pytest.approx(0.312)
    assert peak_petaflops("Tesla V100-SXM2-32GB", "bf16", tf32=False) is None
    for slower in ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 D", ""):
        assert peak_petaflops(slower, "bf16", tf32=False) is None


def test_help_and_guide_have_every_name() -> None:
    from msdiff_dist.cli.plan import plan

    guide = (Path(__file__).parents[3] / "docs/guides/planning.md").read_text()
    for name, gpu in GPUS.items():
        assert name in str(plan.__doc__)
        assert f"| `{name}` | {gpu.memory:g} | {gpu.tflops:g} |" in guide


def test_numbers() -> None:
    gpu = parse_gpu("memory=24,tflops=165,bandwidth=1000")
    assert (gpu.memory, gpu.tflops, gpu.bandwidth, gpu.tf32_tflops) == (24, 165, 1000, 82.5)
    own = parse_gpu("memory=24,tflops=0,fp32_tflops=16,bandwidth=900,reserved=0,fragmentation=0")
    assert own.usable_bytes == 24 * GIB
    assert own.matrix_flops("fp32", tf32=True) == 16e12


def test_numbers_after_a_name_replace_its_own() -> None:
    gpu, named = parse_gpu("h100-80g,compute_efficiency=0.5"), GPUS["h100-80g"]
    assert (gpu.compute_efficiency, gpu.memory) == (0.5, named.memory)
    assert gpu.name == "h100-80g,compute_efficiency=0.5"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h100", ["'h100'", "h100-80g"]),
        ("gtx", ["a100-40g", "v100-32g", "memory=24"]),
        ("memory=24,tflops=165", ["bandwidth is missing"]),
        ("memory=24,tflops=0,bandwidth=900", ["fp32_tflops is missing"]),
        ("memory=24,tflops=165,bandwith=1000", ["'bandwith'", "Did you mean 'bandwidth'"]),
        ("memory=lots,tflops=165,bandwidth=1000", ["memory is 'lots'", "number"]),
        ("memory=-1,tflops=165,bandwidth=1000", ["memory is -1", "above 0"]),
        ("memory=nan,tflops=165,bandwidth=1000", ["memory is nan", "above 0"]),
        ("h100-80g,compute_efficiency=65", ["compute_efficiency is 65", "between 0 and 1"]),
        ("", ["''"]),
    ],
)
def test_refused(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_gpu(text)
    for word in ["--gpu", *words]:
        assert word in str(error.value)
