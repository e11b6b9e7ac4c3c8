"""GPUs, their driver, and what a run would compute on."""

from __future__ import annotations

import ctypes
import glob
import os
from collections.abc import Iterator

from msdiff_dist.apps.doctor.finding import Finding, ask, ok, problem, text_of, warning
from msdiff_dist.apps.doctor.probe import Answers

GB = 1e9
_NO_DRIVER = "Start the container with its GPUs (apptainer --nv, docker --gpus all), or ask the job for GPUs (gres)."


def check_driver(answers: Answers) -> Iterator[Finding]:
    """Whether NVIDIA's driver is new enough for the CUDA runtime that torch brings."""
    wanted, has = answers.about("torch").get("cuda"), driver_cuda_version()
    devices = glob.glob("/dev/nvidia[0-9]*")
    if has is None:
        if devices or text_of("/proc/driver/nvidia/version"):
            yield problem("driver", "there are NVIDIA devices, but libcuda.so.1 cannot be used", _NO_DRIVER)
        else:
            yield ok("driver", "no NVIDIA driver: training computes on CPUs")
        return
    release = (text_of("/sys/module/nvidia/version") or "of unknown release").splitlines()[0]
    found = f"driver {release} for CUDA {has[0]}.{has[1]}, torch brings CUDA {wanted}"
    # Within a major version of CUDA an older driver runs what was built for a newer minor one.
    if wanted and has[0] < int(wanted.split(".")[0]):
        cure = "Install a torch for the driver's CUDA (constraints.txt: CUDA 12.8), or a newer driver."
        yield problem("driver", found, cure)
    else:
        yield ok("driver", found)


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, as (major, minor); None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def check_gpus(answers: Answers) -> Iterator[Finding]:
    """Every GPU that torch sees: memory, compute capability, and a sum on it."""
    torch, devices = answers.about("torch"), answers.known.get("devices")
    if devices is None:
        error = answers.errors.get("devices", "torch does not answer")
        yield problem("GPUs", error, "See the lines on imports and the driver; `nvidia-smi` shows who uses the GPUs.")
        return
    if not devices:
        if driver_cuda_version() is not None:
            cure = "See the lines on the driver and CUDA_VISIBLE_DEVICES; without GPUs a run computes on CPUs, slowly."
            yield problem("GPUs", "there is a driver, but torch sees no GPU", cure)
        else:
            yield ok("GPUs", "none")
        return
    for i, gpu in enumerate(devices):
        major, minor = gpu["capability"]
        name = f"GPU {i}"
        found = f"{gpu['name']}, {gpu['bytes'] / GB:.0f} GB, capability {major}.{minor}"
        built = {int(a.removeprefix("sm_").rstrip("af")) // 10 for a in torch["architectures"] if a.startswith("sm_")}
        if not gpu["computes"]:
            yield problem(name, f"{found}: a sum on it is wrong", "Do not use it; have it examined.")
        elif built and major not in built:
            yield problem(name, f"{found}: this torch has no kernels for it", "Install a torch built for it.")
        elif gpu["free"] < 0.8 * gpu["bytes"]:
            cure = "`nvidia-smi` names the processes that use it; end them, or choose others by CUDA_VISIBLE_DEVICES."
            yield warning(name, f"{found}, of which {gpu['free'] / GB:.0f} GB are free", cure)
        else:
            yield ok(name, found)


def check_modes(answers: Answers) -> Iterator[Finding]:
    """Settings of GPUs that limit what processes may do with them: MIG slices, prohibited or exclusive use."""
    query = ask("nvidia-smi", "--query-gpu=index,compute_mode,mig.mode.current", "--format=csv,noheader")
    for line in query.output.splitlines():
        index, mode, mig = (cell.strip() for cell in line.split(","))
        if mode == "Prohibited":
            cure = "Ask the administrator: `nvidia-smi -c DEFAULT`."
            yield problem(f"mode of GPU {index}", "no process may compute on it", cure)
        elif mig == "Enabled":
            cure = "A process sees one slice, and slices do not reach each other by NCCL: train on whole GPUs."
            yield warning(f"mode of GPU {index}", "divided by MIG", cure)
        elif mode.startswith("Exclusive"):
            yield ok(f"mode of GPU {index}", "one process at a time, as a run needs")


def check_visible(answers: Answers) -> Iterator[Finding]:
    """CUDA_VISIBLE_DEVICES."""
    name, value = "CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return
    entries = [entry.strip() for entry in value.split(",")]
    seen = len(answers.known.get("devices") or [])
    if entries == [""] or entries[0] == "-1":
        if driver_cuda_version() is not None:
            yield warning(name, f"{value!r} hides every GPU", f"Unset it to train on GPUs: `unset {name}`.")
    elif len(set(entries)) < len(entries):
        yield problem(name, f"{value!r} names a GPU twice: CUDA then sees none", "Name each GPU once.")
    elif driver_cuda_version() is not None and seen < len(entries):
        # CUDA ignores an entry that does not exist, and all after it.
        yield problem(name, f"{value!r} names {len(entries)} GPUs, torch sees {seen}", "Name GPUs that are here.")
    else:
        yield ok(name, value)


def check_precision(answers: Answers) -> Iterator[Finding]:
    """What `train.precision: auto` will choose on these devices."""
    support = answers.about("bf16")
    if not support:
        return
    gpus = {words for device, words in support.items() if device != "cpu"}
    for words in sorted(gpus) or [support["cpu"]]:
        chosen = "fp32" if "emulation" in words else "bf16"
        yield ok("precision", f"{words}: train.precision auto is {chosen}")


def check_nccl(answers: Answers) -> Iterator[Finding]:
    """The version of NCCL in torch."""
    nccl = answers.about("torch").get("nccl")
    if nccl:
        yield ok("NCCL", ".".join(map(str, nccl)))
    elif answers.known.get("devices"):
        yield problem("NCCL", "this torch has none", "Install a torch for CUDA: several GPUs need NCCL.")
