"""Speed and memory of whole training steps, beside diffusers' network on the same device and beside `msdiff plan`."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from msdiff_dist.apps.check.findings import Bench, Finding
from msdiff_dist.apps.check.measure import Measured, measure
from msdiff_dist.apps.train.plan import recipe_costs
from msdiff_dist.apps.train.prediction import predict
from msdiff_dist.convert.formats.diffusers_unet import stock_network
from msdiff_dist.distributed.gpus import GPUS, Gpu
from msdiff_dist.distributed.precision import Precision, bf16_support
from msdiff_dist.models.ldm.config import LDMConfig
from msdiff_dist.recipe import Recipe, load_recipe, recipe_mapping
from msdiff_dist.shipped import find_shipped

GROUP = "throughput"
_STEPS = 10
_FEW_STEPS = 3
_MEMORY = 0.1  # greatest relative difference between the planned and the measured peak
_IDLE = 0.1  # share of a step in which a GPU may compute nothing
_SYNCS = 1.0  # waits of the host for the GPU in a step
# Random latents in the place of a data set and of an autoencoder.
_SYNTHETIC = ("data.kind=synthetic", "data.shards=[]", "data.workers=0", "autoencoder.kind=pixel",
              "autoencoder.path=null", "preview.every=0", "checkpoint.every=0")  # fmt: skip
_SD2 = (
    "data.latent_shape=[4,64,64]", "data.context_shape=[77,1024]", "model.in_channels=4", "model.out_channels=4",
    "model.channel_mult=[1,2,4,4]", "model.attention_downsamples=[1,2,4]", "model.num_head_channels=64",
    "model.context_dim=1024", "model.use_linear_in_transformer=true", "model.encoder_channels=320",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Network:
    """A network to measure.

    Attributes:
        recipe, changes: the shipped recipe that trains it, and changes to that.
        micro_batches: samples of a micro batch, one run for each.
        beside_diffusers: whether a class of diffusers computes the same.
    """

    name: str
    recipe: str
    changes: tuple[str, ...]
    micro_batches: tuple[int, ...]
    beside_diffusers: bool


_NETWORKS = (
    _Network(name="LDM, unified", recipe="celebahq256_ldm_unified", changes=(), micro_batches=(16, 48, 128),
             beside_diffusers=True),
    _Network(name="LDM, 3 stages", recipe="celebahq256_ldm_3stage", changes=(), micro_batches=(48, 128),
             beside_diffusers=False),
    _Network(name="SD2 size, unified", recipe="celebahq256_ldm_unified",
             changes=(*_SD2, "model.decoder_channels=[320]"), micro_batches=(16, 64), beside_diffusers=True),
)  # fmt: skip
_SMALL_NETWORK = _Network(
    name="LDM, narrow, unified",
    recipe="celebahq256_ldm_unified",
    changes=("model.encoder_channels=32", "model.decoder_channels=[32]", "data.latent_shape=[3,16,16]"),
    micro_batches=(8,),
    beside_diffusers=True,
)
# Ways to compute a step, by their changes to a recipe. The first is what a recipe does by itself.
_WAYS = {"default": (), "contiguous": ("train.channels_last=false",), "compiled": ("train.compile=true",)}


def throughput(bench: Bench) -> Iterator[Finding]:
    """For each network and micro batch: its speed in every way, diffusers' speed, its memory, and where time goes."""
    for network in (_SMALL_NETWORK,) if bench.small else _NETWORKS:
        for size in network.micro_batches:
            yield from _of_size(bench, network, size)


def _of_size(bench: Bench, network: _Network, size: int) -> Iterator[Finding]:
    precision: Precision = "bf16" if bf16_support(bench.device).native else "fp32"
    name = f"{network.name}, {size} samples, {precision}"
    base = (*_SYNTHETIC, f"train.micro_batch_size={size}", f"train.precision={precision}", *network.changes)
    ways = {"default": _WAYS["default"]} if bench.small else _WAYS
    gpu = gpu_of(torch.cuda.get_device_name(bench.device)) if bench.on_gpu else None
    fastest = 0.0
    for way, changes in ways.items():
        recipe = load_recipe(find_shipped(network.recipe).path, [*base, *changes])
        measured = measure(bench, recipe_mapping(recipe), steps=_steps(bench), profiled=way == "default")
        fastest = max(fastest, measured.images_per_second)
        yield _speed(f"{name}, {way}", measured, gpu, precision)
        if way == "default":
            yield _memory(bench, name, recipe, measured)
            yield from _profile(name, measured)
    if network.beside_diffusers:
        yield _beside_diffusers(bench, name, recipe, size, precision, fastest)


def _speed(name: str, measured: Measured, gpu: Gpu | None, precision: Precision) -> Finding:
    mfu = None if gpu is None else measured.flops_per_second / gpu.matrix_flops(precision, tf32=False)
    found = f"{measured.images_per_second:.1f} images/s, {measured.flops_per_second / 1e12:.2f} TFLOP/s"
    figures = {
        "images_per_second": measured.images_per_second,
        "flops_per_second": measured.flops_per_second,
        "mfu": mfu,
    }
    return Finding(
        group=GROUP, name=name, status="ok", found=found + (f", MFU {mfu:.1%}" if mfu else ""), figures=figures
    )


def _memory(bench: Bench, name: str, recipe: Recipe, measured: Measured) -> Finding:
    """The measured peak beside the planned one. On a CPU the process's other memory is as large: no verdict there."""
    planned = predict(recipe, 1, on_gpus=bench.on_gpu)["ranks"][0]["peak_bytes"]["total"]
    difference = measured.peak_bytes / planned - 1
    found = f"peak {measured.peak_bytes / 1e6:,.0f} MB, planned {planned / 1e6:,.0f} MB"
    off = bench.on_gpu and abs(difference) > _MEMORY
    return Finding(
        group=GROUP,
        name=f"{name}, memory",
        status="warning" if off else "ok",
        found=found + (f" ({difference:+.0%})" if bench.on_gpu else " (not judged on a CPU)"),
        figures={"measured_bytes": measured.peak_bytes, "planned_bytes": planned},
    )


def _profile(name: str, measured: Measured) -> Iterator[Finding]:
    profile = measured.profile
    assert profile is not None
    longest, share = next(iter(profile.shares.items()))
    figures: dict[str, Any] = {"launches": profile.launches, "shares": profile.shares}
    if profile.idle_share is None or profile.syncs is None:
        found = f"{profile.launches:.0f} operators a step, longest {longest} ({share:.0%})"
        yield Finding(group=GROUP, name=f"{name}, profile", status="ok", found=found, figures=figures)
        return
    waits = profile.idle_share > _IDLE or profile.syncs > _SYNCS
    yield Finding(
        group=GROUP,
        name=f"{name}, profile",
        status="warning" if waits else "ok",
        found=f"{profile.launches:.0f} kernels a step, longest {longest} ({share:.0%}), idle {profile.idle_share:.0%}, "
        f"{profile.syncs:.1f} waits of the host",
        figures=figures | {"idle_share": profile.idle_share, "syncs": profile.syncs},
    )


def _beside_diffusers(bench: Bench, name: str, recipe: Recipe, size: int, precision: Precision, ours: float) -> Finding:
    """The speed of diffusers' network of the same architecture, trained in a plain loop, and how ours compares."""
    model = recipe.model
    assert isinstance(model, LDMConfig)
    seconds = _plain_training(bench, model, recipe, size, precision)
    theirs = size / seconds
    found = f"{theirs:.1f} images/s; ours takes {theirs / ours:.2f} of its time"
    figures = {
        "images_per_second": theirs,
        "time_ratio": theirs / ours,
        "macs": recipe_costs(recipe).equivalent_macs((1.0,)),
    }
    return Finding(group=GROUP, name=f"{name}, diffusers", status="ok", found=found, figures=figures)


def _plain_training(bench: Bench, model: LDMConfig, recipe: Recipe, size: int, precision: Precision) -> float:
    """Median seconds of a step as people write it: autocast, fused AdamW where there is one, an average of weights."""
    device = bench.device
    network = stock_network(model).to(device)
    parameters = list(network.parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=bench.on_gpu)
    x_BCHW = torch.randn(size, *recipe.latent_shape, device=device)
    t_B = torch.randint(1000, (size,), device=device)
    context = recipe.data.context_shape
    extra = (torch.randn(size, *context, device=device),) if context else ()
    seconds = []
    for _ in range(2 + _steps(bench)):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = network(x_BCHW, t_B, *extra).sample
        (output.float() - x_BCHW).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 0.01)
        if bench.on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    del network, parameters, averages, optimizer
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()
    return statistics.median(seconds[2:])


def _steps(bench: Bench) -> int:
    return _FEW_STEPS if bench.small else _STEPS


def gpu_of(device_name: str) -> Gpu | None:
    """The GPU of the plan's table that a driver calls so, such as `NVIDIA H100 80GB HBM3`; None if it is not there."""
    words = device_name.lower().replace("geforce ", "").replace("rtx ", "rtx").replace("-", " ").split()
    named = [gpu for name, gpu in GPUS.items() if name.split("-")[0] in words]
    return next((gpu for gpu in named if any(_gigabytes(word, gpu) for word in words)), named[0] if named else None)


def _gigabytes(word: str, gpu: Gpu) -> bool:
    """Whether a word such as `80gb` is the size of this GPU's memory."""
    digits = word.removesuffix("gb")
    return word.endswith("gb") and digits.isdigit() and f"-{digits}g" in gpu.name
