"""Training steps of a recipe on one rank, measured: time, memory, and on a GPU how busy it was."""

from __future__ import annotations

import os
import resource
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from msdiff_dist.apps.check.findings import Bench
from msdiff_dist.apps.train.local import PRELOAD
from msdiff_dist.distributed.environment import process_group
from msdiff_dist.distributed.heartbeat import WaitLimits
from msdiff_dist.distributed.kernels import choose_kernels
from msdiff_dist.distributed.spawn import run_ranks
from msdiff_dist.recipe import recipe_from
from msdiff_dist.training.run_folder import RunFolder

if TYPE_CHECKING:
    from msdiff_dist.apps.train.trainer import Trainer

_WARM_UP = 3  # steps: kernels are chosen, and buffers grow to their size
_LR = 1e-4
_SYNC = "synchronizing CUDA operation"  # of torch's warning


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a profiler saw of some steps.

    Attributes:
        idle_share: share of the time in which no kernel ran; None on a CPU.
        launches: kernels per step; on a CPU operators.
        syncs: waits of the host for the device per step; None on a CPU.
        shares: share of the whole time of each of the ten longest kernels or operators, by name.
    """

    idle_share: float | None
    launches: float
    syncs: float | None
    shares: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What some training steps took.

    Attributes:
        step_seconds: median time of a step.
        images_per_second: samples of the global batch over it.
        flops_per_second: floating-point operations of the network's forward and backward passes over it.
        peak_bytes: highest use of device memory, on a CPU the growth of resident memory since the rank's libraries were
            loaded.
        profile: None if none was asked for.
    """

    step_seconds: float
    images_per_second: float
    flops_per_second: float
    peak_bytes: int
    profile: Profile | None


def measure(bench: Bench, mapping: dict[str, Any], *, steps: int, profiled: bool = False) -> Measured:
    """Train `steps` steps of a recipe, given as plain data, on one rank in a process of its own."""
    folder = bench.folder / "measured"
    env = {} if bench.on_gpu else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    result: Measured = run_ranks(_measured, 1, mapping, folder, steps, profiled, preload=PRELOAD, env=env)[0]
    return result


def _measured(rank: int, mapping: dict[str, Any], folder: Path, steps: int, profiled: bool) -> Measured:
    """Body of the rank."""
    # What libraries print, the profiler's among them, is not for the user. File descriptors, since native code prints.
    with (folder.parent / "measured.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from msdiff_dist.apps.train.trainer import Trainer

    recipe = recipe_from(mapping)
    before = _resident_bytes()
    limits = WaitLimits(step_s=recipe.train.timeout_s, start_s=recipe.train.start_timeout_s)
    with ExitStack() as stack:
        env = stack.enter_context(process_group(limits))
        choose_kernels(env.device, recipe.train.tf32)
        trainer = stack.enter_context(Trainer(recipe, RunFolder(folder), env))
        on_gpu = env.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(_WARM_UP + steps):
            start = time.perf_counter()
            trainer.step(_LR)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if on_gpu else _resident_bytes() - before
        step_seconds = statistics.median(seconds[_WARM_UP:])
        return Measured(
            step_seconds=step_seconds,
            images_per_second=trainer.batch_size / step_seconds,
            flops_per_second=trainer.step_petaflops * 1e15 / step_seconds,
            peak_bytes=peak,
            profile=_profile(trainer, steps) if profiled else None,
        )


def _profile(trainer: Trainer, steps: int) -> Profile:
    """Take `steps` more steps under torch's profiler, and as many while torch reports synchronisations."""
    on_gpu = trainer.env.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            trainer.step(_LR)
        if on_gpu:
            torch.cuda.synchronize()
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    averages = [e for e in profiler.key_averages() if e.device_type == device]
    times = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in averages}
    whole = sum(times.values()) or 1.0
    longest = sorted(times, key=lambda key: -times[key])[:10]
    spans = [(e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return Profile(
        idle_share=1 - busy_share(spans) if on_gpu else None,
        launches=sum(e.count for e in averages) / steps,
        syncs=_syncs(trainer, steps) if on_gpu else None,
        shares={key[:80]: times[key] / whole for key in longest},
    )


def busy_share(spans: Sequence[tuple[float, float]]) -> float:
    """Share of the time from the first start to the last end that lies in at least one of the (start, end) spans."""
    if not spans:
        return 0.0
    ordered = sorted(spans)
    first, reached, busy = ordered[0][0], ordered[0][0], 0.0
    for start, end in ordered:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / (reached - first) if reached > first else 0.0


def _syncs(trainer: Trainer, steps: int) -> float:
    """Synchronisations per step, from the warnings that torch prints for them."""
    with _sync_warnings() as seen:
        for _ in range(steps):
            trainer.step(_LR)
    return sum(_SYNC in str(w.message) for w in seen) / steps


@contextmanager
def _sync_warnings() -> Iterator[list[warnings.WarningMessage]]:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            yield seen
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _resident_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
