"""What the operating system and its containers allow: files, shared memory, memory, cores."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from msdiff_dist.apps.doctor.finding import Finding, ok, problem, text_of, warning
from msdiff_dist.apps.doctor.probe import Answers
from msdiff_dist.distributed.descriptors import descriptors_needed

GIB = 2**30
_RANKS = (8, 64, 512, 4096)
_SHM_BYTES = GIB


def check_descriptors(answers: Answers) -> Iterator[Finding]:
    """The limit on open files, and how many ranks a run can have under it. Ranks raise the soft limit themselves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    on_gpus = bool(answers.known.get("devices"))
    words = f"{_number(soft)}, at most {_number(hard)}"
    if hard == resource.RLIM_INFINITY:
        yield ok("open files", words)
        return
    most = max((w for w in range(1, 1 << 16) if descriptors_needed(w, on_gpus=on_gpus) <= hard), default=0)
    found = f"{words}: enough for runs of {most} ranks" if most < (1 << 16) - 1 else words
    cure = "Raise the hard limit on every node (ulimit -Hn, LimitNOFILE of slurmd or of the container) for larger runs."
    if most < _RANKS[0]:
        yield problem("open files", found, cure)
    elif most < _RANKS[2]:
        yield warning("open files", found, cure)
    else:
        yield ok("open files", found)


def _number(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def check_shared_memory(answers: Answers) -> Iterator[Finding]:
    """/dev/shm, through which loader workers hand over samples, and NCCL's ranks of one node exchange data."""
    folder = Path("/dev/shm")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield problem("shared memory", f"{folder} cannot be written", "Mount it: `mount -t tmpfs tmpfs /dev/shm`.")
        return
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in {folder}"
    if usage.free < _SHM_BYTES:
        cure = "Give the container more (docker --shm-size 16g, or --ipc host), or remove what lies there."
        yield warning("shared memory", found, cure)
    else:
        yield ok("shared memory", found)


def check_memory(answers: Answers) -> Iterator[Finding]:
    """Memory of the machine, and what the control group of this process may have of it."""
    lines = dict(re.findall(r"^(\w+): +(\d+) kB", text_of("/proc/meminfo") or "", re.MULTILINE))
    total, free = (int(lines.get(name, 0)) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = memory_limit()
    found = f"{free / GIB:.0f} of {total / GIB:.0f} GiB available"
    if limit is not None and limit < total:
        found += f", limited to {limit / GIB:.1f} GiB for this job or container"
    if min(free, limit if limit is not None else free) < 4 * GIB:
        cure = "Ask for more (memory_gb of a cluster file, --memory of the container): a rank takes some GiB."
        yield warning("memory", found, cure)
    else:
        yield ok("memory", found)


def memory_limit(root: Path = Path("/sys/fs/cgroup"), own: str | None = None) -> int | None:
    """The least limit in bytes of this process's control group and those around it; None if there is none.

    Args:
        own: content of /proc/self/cgroup; None: read it.
    """
    own = own if own is not None else text_of("/proc/self/cgroup") or ""
    limits = []
    for _, controllers, path in re.findall(r"^(\d+):([^:]*):(.*)$", own, re.MULTILINE):
        version_2 = controllers == ""
        if not version_2 and "memory" not in controllers.split(","):
            continue
        top = root if version_2 else root / "memory"
        file = "memory.max" if version_2 else "memory.limit_in_bytes"
        inner = top / path.lstrip("/")
        # In a container the group's path may be that of the host; its own files then lie at the top.
        for folder in (top, *(f for f in (inner, *inner.parents) if f.is_relative_to(top))):
            if (text := text_of(folder / file)) and text.isdigit():
                limits.append(int(text))
    return min(limits, default=None)


def check_cores(answers: Answers) -> Iterator[Finding]:
    """Cores that this process may use, and OMP_NUM_THREADS."""
    own = answers.about("cores")
    cores = own.get("count") or len(os.sched_getaffinity(0))
    usable = min(cores, own["quota"]) if own.get("quota") else cores
    found = f"{cores} of the {os.cpu_count()} hardware threads' cores" if cores != os.cpu_count() else f"{cores} cores"
    if usable < cores:
        found += f", limited to the computing time of {usable:.1f}"
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads.isdigit() and int(threads) > usable:
        cure = "Unset it, or set it to the cores of one rank: threads that share a core wait for each other."
        yield warning("cores", f"{found}, but OMP_NUM_THREADS is {threads}", cure)
    else:
        yield ok("cores", found + (f", OMP_NUM_THREADS is {threads}" if threads else ""))
