"""Cluster files: what a job asks of one cluster. Nothing in them depends on the recipe, so one file serves all runs."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from msdiff_dist.bounds import check_between
from msdiff_dist.config import from_mapping
from msdiff_dist.errors import ConfigError, raise_all
from msdiff_dist.files.text import Document, read_document, read_text
from msdiff_dist.files.yaml_places import Places
from msdiff_dist.files.yaml_tree import compose_yaml
from msdiff_dist.launch.gres import gpus, of_one_rank, parse_gres
from msdiff_dist.shipped import where_to_get

# What sbatch takes: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes,
# days-hours:minutes:seconds.
_TIME = re.compile(r"(?:(?P<days>\d{1,5})-)?(?P<first>\d{1,9})(?::(?P<second>\d\d?))?(?::(?P<third>\d\d?))?")

_MOST_NODES = 16_384
_BOUNDS = {
    "gpus_per_node": (0, 256),
    "tasks_per_node": (1, 4096),
    "cpus_per_task": (1, 4096),
    "max_parallel": (1, 10**6),
    "max_restarts": (1, 10**6),
    "signal_delay_s": (1, 10**6),
    "memory_gb": (0, 10**6),
}


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """One cluster file. Every field has a default except those a SLURM cluster cannot do without.

    executor: `slurm`, or without it `local` (processes on this machine, in the background) or `debug` (this process).
    shared: a folder that every node sees under the same path; run folders must be in it. Required for `slurm`.
    partition, account, qos, constraint: passed to sbatch as they are.
    nodes: number of nodes, or a range "2-4": the job starts on any number in it, and may restart on another.
    gpus_per_node: GPUs asked for on each node; one rank runs on each.
    tasks_per_node: ranks on each node where there are no GPUs.
    gres: how to ask for GPUs where --gpus-per-node is not accepted, e.g. "gpu:a100:8".
    cpus_per_task, memory_gb: CPUs of each rank (also its OMP_NUM_THREADS), memory of each node (None: the cluster's
        default).
    time: limit of one start of the job, as sbatch reads it: "minutes", "minutes:seconds", "hours:minutes:seconds",
        "days-hours", "days-hours:minutes[:seconds]". The job resumes by itself after it.
    signal_delay_s: seconds before the limit at which a signal makes the job save and stop.
    exclusive: ask for whole nodes.
    sbatch: any further sbatch options, e.g. {reservation: night, mail-type: FAIL}.
    srun: any further srun arguments, e.g. ["--cpu-bind=none", "--container-image=..."].
    setup: shell lines run on the first node before the tasks start, e.g. "module load cuda", "conda activate msdiff".
    python: the interpreter on the nodes. Default: the one that launches.
    container: a command put before it, e.g. "apptainer exec --nv /shared/msdiff.sif".
    environment: variables exported to every rank.
    interface: IP interface by which ranks find each other, and of the TCP of gloo and NCCL, e.g. "eth1" (None: they
        choose). It does not decide whether NCCL uses InfiniBand.
    max_parallel: runs of a sweep, or parts of a data job, at the same time.
    max_restarts: starts in a row without a new checkpoint, after which the job gives up.
    """

    executor: Literal["slurm", "local", "debug"] = "slurm"
    shared: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int | str = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 1
    gres: str | None = None
    cpus_per_task: int = 1
    memory_gb: float | None = None
    time: str | int = "24:00:00"
    signal_delay_s: int = 120
    exclusive: bool = False
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)
    srun: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    python: str = sys.executable
    container: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    interface: str | None = None
    max_parallel: int = 8
    max_restarts: int = 5

    def __post_init__(self) -> None:
        for name, (least, most_of) in _BOUNDS.items():
            check_between(name, getattr(self, name), least, most_of)
        self._check_lines()
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise ConfigError("memory_gb", self.memory_gb, "must be above 0", "Give gigabytes per node, or remove it.")
        if self.gpus_per_node and self.tasks_per_node not in (1, self.gpus_per_node):
            raise ConfigError(
                "tasks_per_node", self.tasks_per_node, f"one task runs on each of the {self.gpus_per_node} GPUs",
                "Remove tasks_per_node.",
            )  # fmt: skip
        if self.gres and not self.gpus_per_node:
            raise ConfigError("gres", self.gres, "needs the number of GPUs too", "Set gpus_per_node.")
        if self.gres:
            self._check_gres(self.gres)
        most = self.node_range[1]
        if self.executor == "slurm" and self.shared is None:
            raise ConfigError("shared", None, "is required for executor `slurm`", "Name a folder that every node sees.")
        if self.executor != "slurm" and most > 1:
            raise ConfigError("nodes", self.nodes, f"the {self.executor} executor has one node", "Set nodes to 1.")
        if self.executor == "debug" and self.ranks_per_node > 1:
            raise ConfigError(
                "gpus_per_node", self.ranks_per_node, "the debug executor runs one process", "Use `--cluster local`."
            )
        if self.time_s <= self.signal_delay_s:
            raise ConfigError(
                "time", self.time, f"is not longer than signal_delay_s = {self.signal_delay_s} s: no time to train",
                "Ask for more time or lower signal_delay_s.",
            )  # fmt: skip

    def _check_lines(self) -> None:
        """Refuse what would become further lines, or no variable, in the shell script of a job."""
        words = {name: value for name, value in vars(self).items() if isinstance(value, str)}
        lists = {name: " ".join(map(str, getattr(self, name))) for name in ("srun", "sbatch")}
        lists["sbatch"] += " ".join(map(str, self.sbatch.values()))
        for name, value in {**words, **lists}.items():
            if "\n" in value or "\r" in value:
                raise ConfigError(name, getattr(self, name), "has more than one line", "Write it on one line.")
            if name in words and not value.strip():
                raise ConfigError(name, value, "is empty", "Remove it.")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                problem = "is not the name of an environment variable"
                raise ConfigError("environment", name, problem, "Use letters, digits and _.")

    def _check_gres(self, gres: str) -> None:
        try:
            asked = gpus(parse_gres(gres))
        except ValueError as e:
            remedy = 'Write "gpu:4" or "gpu:a100:4", several resources with commas between them.'
            raise ConfigError("gres", gres, f"{e} is no resource", remedy) from None
        if asked != self.gpus_per_node:
            problem = f"asks for {asked} GPUs on a node, and gpus_per_node is {self.gpus_per_node}"
            raise ConfigError("gres", gres, problem, "Make the two numbers equal.")

    @property
    def node_range(self) -> tuple[int, int]:
        """Fewest and most nodes."""
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", str(self.nodes))
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high <= _MOST_NODES:
            problem = f"is neither a number nor a range from 1 to {_MOST_NODES}"
            raise ConfigError("nodes", self.nodes, problem, 'Write it as 4 or "2-4".')
        return low, high

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.tasks_per_node

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """Every number of ranks that the job may start with, ascending."""
        low, high = self.node_range
        return tuple(n * self.ranks_per_node for n in range(low, high + 1))

    @property
    def time_s(self) -> int:
        """The time limit in seconds, read as SLURM reads it."""
        match = _TIME.fullmatch(self.time) if isinstance(self.time, str) else None
        if match is None:
            why = " (YAML reads 24:00:00 without quotes as a number)" if isinstance(self.time, int) else ""
            remedy = 'Write "minutes", "hours:minutes:seconds" or "days-hours" in quotes, as for sbatch --time.'
            raise ConfigError("time", self.time, f"is not a time limit{why}", remedy)
        numbers = [int(match[name]) for name in ("first", "second", "third") if match[name]]
        # Without days, the last number is seconds, but a single one is minutes; with days, the first one is hours.
        if match["days"] is None:
            hours, minutes, seconds = ([0, *numbers, 0] if len(numbers) == 1 else [0, 0, *numbers])[-3:]
        else:
            hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def load_cluster(name: str, overrides: dict[str, Any] | None = None) -> ClusterConfig:
    """Load the cluster file `name`, or `local` or `debug`. Command-line `overrides` that are not None replace fields.

    Raises:
        ConfigError: no such file, not YAML, an unknown field, a value that makes no sense.
    """
    # An error in a field names the option where the value came from one, else the file and the line.
    options = {"nodes": "--nodes", "gpus_per_node": "--gpus-per-node", "time": "--time"}
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    if name in ("local", "debug"):
        document = Document({"executor": name}, Places(name), [])
    else:
        path = Path(name)
        if not path.expanduser().exists() and not path.is_symlink():
            command = where_to_get(path) or "msdiff init slurm/gpu"
            remedy = f"`{command}` writes one to edit; `local` and `debug` need none."
            raise ConfigError("--cluster", name, "no such file", remedy)
        document = read_document(path, "--cluster")
        document.errors.extend(_sbatch_numbers(path))

    def build(mapping: dict[str, Any]) -> ClusterConfig:
        try:
            config: ClusterConfig = from_mapping(ClusterConfig, {**mapping, **given})
        except ConfigError as e:
            raise_all(
                ConfigError(options[one.field], one.value, one.problem, one.remedy) if one.field in given else one
                for one in e.errors
            )
            raise
        return config

    document.places.elsewhere.update((option, "") for option in options.values())  # an option is its own place
    return document.parsed(build)


def _sbatch_numbers(path: Path) -> Iterator[ConfigError]:
    """An error for each option under `sbatch` that YAML reads as another number than the one written.

    It reads 16:30 as 990 and 0123 as 83. Other fields have one type each, but here numbers are as good as text.
    """
    root = compose_yaml(read_text(path, "--cluster"))
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    sections = [value for key, value in pairs if key.value == "sbatch"]
    for section in (node for node in sections if isinstance(node, yaml.MappingNode)):
        for key, node in section.value:
            is_number = node.tag == "tag:yaml.org,2002:int"
            if is_number and not re.fullmatch(r"[-+]?(0|[1-9]\d*)", node.value):
                problem = "is a number to YAML, and another one than it looks like"
                remedy = f'Put it in quotes: {key.value}: "{node.value}".'
                yield ConfigError(f"sbatch.{key.value}", node.value, problem, remedy)


def one_rank(cluster: ClusterConfig) -> ClusterConfig:
    """The same cluster file for one rank: one node, one GPU if there are any, that rank's share of the memory."""
    return dataclasses.replace(
        cluster,
        nodes=1,
        tasks_per_node=1,
        gpus_per_node=min(1, cluster.gpus_per_node),
        gres=of_one_rank(parse_gres(cluster.gres)) if cluster.gres else None,
        memory_gb=cluster.memory_gb / cluster.ranks_per_node if cluster.memory_gb else None,
        exclusive=False,
    )
