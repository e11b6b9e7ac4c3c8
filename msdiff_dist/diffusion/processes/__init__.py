"""The table of diffusion processes that a recipe can name, each with the dataclass of its section."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig, DiscreteProcess
from msdiff_dist.diffusion.processes.edm import EDMConfig, EDMProcess
from msdiff_dist.diffusion.processes.vp import VPConfig, VPProcess
from msdiff_dist.registry import Table


@dataclass(frozen=True)
class ProcessKind:
    """A process that a recipe can name.

    Args:
        config: dataclass of the recipe section `diffusion.NAME`; every field must have a default.
        build: makes the process from an instance of `config`.
    """

    config: type
    build: Callable[[Any], Process]


PROCESSES: Table[ProcessKind] = Table(
    "process",
    {
        "discrete": ProcessKind(DiscreteConfig, DiscreteProcess),
        "vp": ProcessKind(VPConfig, VPProcess),
        "edm": ProcessKind(EDMConfig, EDMProcess),
    },
)
