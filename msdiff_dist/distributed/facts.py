"""What each rank runs on, and whether ranks on these can train together: compared before any process group is made.

Ranks that differ in whether they have a GPU would choose different backends and wait for each other until a time limit.
Other differences crash in the first collective, or train something else without a word.
"""

from __future__ import annotations

import dataclasses
import importlib
import operator
import os
import platform
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msdiff_dist.errors import UserError

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one rank runs on. Every field has a default: a rank with another version of the package may lack some.

    Attributes:
        rank, host: who it is.
        package, python, torch, cuda, nccl: versions; `cuda` and `nccl` are those that torch was built with.
        driver: version of the NVIDIA driver, "none" without one.
        gpu: name of the rank's GPU, "none" without one.
        gpu_uuid: identity of that GPU, the same in every process that uses it.
        refusal: field, value, problem and remedy of the `UserError` why this rank by itself cannot train.
    """

    rank: int = 0
    host: str = ""
    package: str = ""
    python: str = ""
    torch: str = ""
    cuda: str = "none"
    nccl: str = "none"
    driver: str = "none"
    gpu: str = "none"
    gpu_uuid: str = ""
    refusal: tuple[str, Any, str, str] | None = None

    @staticmethod
    def load(values: dict[str, Any]) -> Facts:
        """From the JSON values of `dataclasses.asdict`; those that this version does not know are dropped."""
        known = {field.name for field in dataclasses.fields(Facts)}
        return Facts(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True)
class AskedGpus:
    """How many GPUs each node has to show, and the field, variable or option that asks for them."""

    number: int
    field: str


def facts_of_this_rank(rank: int, local_rank: int, asked: AskedGpus | None) -> Facts:
    """What this process runs on. It chooses no GPU and makes no process group."""
    host = socket.gethostname()
    on_gpu = torch.cuda.is_available()
    refusal = refused_gpus(asked, host) or _refused_local_rank(local_rank, host) or _refused_interface(host)
    gpu = torch.cuda.get_device_properties(local_rank) if on_gpu and not refusal else None
    # By name: an import statement of the package's root would count as one of all that the root imports.
    package = importlib.import_module(__name__.partition(".")[0])
    return Facts(
        rank=rank,
        host=host,
        package=package.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "none",
        nccl=".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else "none",
        driver=driver_version() or "none",
        gpu=gpu.name if gpu else "none",
        gpu_uuid=str(gpu.uuid) if gpu else "",
        refusal=None if refusal is None else (refusal.field, refusal.value, refusal.problem, refusal.remedy),
    )


def compare(facts: Sequence[Facts]) -> tuple[UserError | None, list[str]]:
    """Why these ranks cannot train together (None: they can), and differences that are only worth a warning."""
    for own in facts:
        if own.refusal:
            return UserError(*own.refusal), []
    refusal = _mixed_devices(facts) or _shared_gpu(facts)
    for name, remedy in (
        ("package", "Start every rank from the same msdiff_dist: see PYTHONPATH and the interpreter on each host."),
        ("torch", "Install the same version in the environment of every host."),
        ("cuda", "Install the same build of torch in the environment of every host."),
        ("nccl", "Install the same version in the environment of every host."),
    ):
        if refusal is None and (groups := _differing(facts, operator.attrgetter(name))):
            what = "msdiff_dist" if name == "package" else "CUDA of torch" if name == "cuda" else name
            refusal = UserError(what, groups, "the ranks have different versions", remedy)
    warnings = []
    for name, what in (("gpu", "GPUs"), ("driver", "NVIDIA drivers"), ("python", "versions of Python")):
        if groups := _differing(facts, operator.attrgetter(name)):
            warnings.append(f"the ranks have different {what}: {groups}")
    return refusal, warnings


def _mixed_devices(facts: Sequence[Facts]) -> UserError | None:
    if groups := _differing(facts, lambda own: "none" if own.gpu == "none" else "a GPU"):
        return UserError(
            "GPU", groups, "some ranks have a GPU and others none",
            "Give every rank a GPU, or none: on the hosts without, look at `nvidia-smi`, the driver and "
            "CUDA_VISIBLE_DEVICES.",
        )  # fmt: skip
    return None


def _shared_gpu(facts: Sequence[Facts]) -> UserError | None:
    user_of: dict[tuple[str, str], Facts] = {}
    for own in facts:
        first = user_of.setdefault((own.host, own.gpu_uuid), own)
        if own.gpu_uuid and first is not own:
            return UserError(
                "GPU", own.gpu_uuid, f"ranks {first.rank} and {own.rank} on {own.host} use the same {own.gpu}",
                "Start one rank per GPU, each with its own LOCAL_RANK, and let every rank see all GPUs of its node.",
            )  # fmt: skip
    return None


def _differing(facts: Sequence[Facts], of: Callable[[Facts], str]) -> str:
    """ "2.13.0 on ranks 0-3 (node1), 2.14.1 on rank 4 (node2)"; empty if all ranks have the same."""
    by_value: dict[str, list[Facts]] = {}
    for own in facts:
        by_value.setdefault(of(own), []).append(own)
    if len(by_value) == 1:
        return ""
    return ", ".join(f"{value} on {_named(holders)}" for value, holders in by_value.items())


def _named(facts: Sequence[Facts]) -> str:
    hosts = list(dict.fromkeys(own.host for own in facts))
    more = f" and {len(hosts) - 3} more hosts" if len(hosts) > 3 else ""
    return f"{ranks_text([own.rank for own in facts])} ({', '.join(hosts[:3])}{more})"


def ranks_text(ranks: Sequence[int]) -> str:
    """ "rank 3" or "ranks 0-3, 7", from ascending numbers."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and rank == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], rank]
        else:
            ranges.append([rank])
    text = ", ".join("-".join(map(str, r)) for r in ranges)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def refused_gpus(asked: AskedGpus | None, host: str) -> UserError | None:
    """The error if this host shows fewer GPUs than were asked for."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is None or found >= asked.number:
        return None
    if found:
        problem, remedy = f"host {host} shows {found}", "Ask for as many as there are, or see CUDA_VISIBLE_DEVICES."
    else:
        why, remedy = why_no_gpu()
        problem = f"host {host} shows no GPU: {why}"
    return UserError(asked.field, asked.number, problem, remedy)


def why_no_gpu() -> tuple[str, str]:
    """Why torch sees no GPU in this process, as a clause, and a sentence that says what to do."""
    driver, built = driver_version(), f"torch {torch.__version__} is built"
    if torch.version.cuda is None:
        return f"{built} without CUDA", "Install a build of torch with CUDA."
    built += f" for CUDA {torch.version.cuda}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides all", "Unset it, or ask the scheduler for GPUs."
    if driver is None:
        return (
            f"there is no NVIDIA driver ({built})",
            "Use a host with a GPU; start a container with `apptainer --nv` or `docker --gpus all`.",
        )
    try:
        torch.cuda.init()
        reason = "CUDA starts, and finds no device"
    except RuntimeError as e:
        reason = str(e).splitlines()[0].partition(" Please")[0]
    return (
        f"the driver is {driver} and {built}: {reason}",
        "Compare with `nvidia-smi`: update the driver, install a torch built for an older CUDA, or give the job or the "
        "container its devices.",
    )


def driver_version() -> str | None:
    """Version of the NVIDIA driver that the kernel has loaded; None without one. A container sees its host's."""
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023"
    text = _DRIVER.read_text() if _DRIVER.is_file() else ""
    match = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return match[0] if match else None


def _refused_local_rank(local_rank: int, host: str) -> UserError | None:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found or local_rank < found:
        return None
    seen = "1 GPU" if found == 1 else f"{found} GPUs"
    return UserError("LOCAL_RANK", local_rank, f"host {host} shows {seen}", "Start one rank per GPU.")


def _refused_interface(host: str) -> UserError | None:
    """The error if a variable names a network interface that this host does not have."""
    here = [name for _, name in socket.if_nameindex()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        asked = os.environ.get(variable, "")
        if asked and not any(_accepts(asked, name, prefixes=variable.startswith("NCCL")) for name in here):
            return UserError(
                variable, asked, f"host {host} has no such network interface, only {', '.join(here)}",
                "Name one that every host has (`ip link`): `interface` in a cluster file sets it.",
            )  # fmt: skip
    return None


def _accepts(asked: str, name: str, prefixes: bool) -> bool:
    """Whether a list of interfaces accepts this one.

    Args:
        prefixes: as NCCL reads the list: of prefixes, after `=` of whole names, after `^` of what is not accepted.
    """
    if not prefixes:
        return name in asked.split(",")
    words = asked.lstrip("^=").split(",")
    exact = asked.lstrip("^").startswith("=")
    fits = any(name == word if exact else name.startswith(word) for word in words)
    return fits != asked.startswith("^")
