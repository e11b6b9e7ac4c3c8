"""How many threads a rank computes with: its share of the cores that it may use."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msdiff_dist.distributed.agree import combined, main_exchange

_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Cores:
    """What a process may compute on.

    Attributes:
        node: name of its machine.
        numbers: the cores to which it is bound, each named by the first of its hardware threads: a second thread of the
            same core adds nothing to matrix products.
        quota: seconds of computing a second that the machine's processes have together, below the number of cores in
            containers that are limited so; None: no limit.
    """

    node: str
    numbers: frozenset[int]
    quota: float | None


def threads_per_rank() -> int:
    """The value of OMP_NUM_THREADS, which jobs on a cluster set, else this rank's share of its node. Collective."""
    shares = combined(cores(), lambda every: [threads_of(own, every) for own in every])
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # OpenMP allows a list, one number per level
    return int(threads) if threads.isdigit() and int(threads) else shares[main_exchange().rank]


def threads_of(own: Cores, processes: Sequence[Cores]) -> int:
    """Threads of one process among all that compute at the same time, itself included, on any nodes.

    Launchers differ in whether they bind each rank to cores of its own (srun) or let all share the node (torchrun). So
    the number of processes bound to a core decides its share, not the number of ranks on the node.
    """
    neighbours = [p for p in processes if p.node == own.node]
    share = sum(1 / sum(core in p.numbers for p in neighbours) for core in own.numbers)
    if own.quota is not None:
        share = min(share, own.quota / len(neighbours))
    return max(1, int(share + 1e-9))  # thirds of cores do not sum to whole numbers


def cores(topology: Path = _TOPOLOGY, quota: Path = _QUOTA) -> Cores:
    """What this process may compute on.

    Args:
        topology: folder with a folder for each hardware thread, as Linux has it.
        quota: file with the limit of this container's control group, as Linux has it.
    """
    numbers = frozenset(_core_of(cpu, topology) for cpu in os.sched_getaffinity(0))
    return Cores(socket.gethostname(), numbers, _read_quota(quota))


def _core_of(cpu: int, topology: Path) -> int:
    """The first hardware thread of the core of `cpu`; itself where the system does not say."""
    siblings = topology / f"cpu{cpu}/topology/thread_siblings_list"
    if not siblings.exists():
        return cpu
    return int(siblings.read_text().replace("-", ",").split(",")[0])  # "0,64" or "0-1"


def _read_quota(file: Path) -> float | None:
    """Microseconds of computing over those of a period, which the file holds; None for "max"."""
    granted, _, period = file.read_text().partition(" ") if file.exists() else ("max", "", "")
    return int(granted) / int(period) if granted != "max" else None
