"""Questions to SLURM's client commands: whether the cluster has what is asked for, and the states of jobs."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msdiff_dist.errors import ConfigError, UserError, did_you_mean
from msdiff_dist.launch.cluster import ClusterConfig
from msdiff_dist.launch.gres import gpus, parse_gres

# States of a job that runs or may still run.
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED")


@dataclass(frozen=True, kw_only=True)
class JobInfo:
    """One job, or one task of a job array ("12_3").

    state: SLURM's word. nodes: their number. restarts: times it was requeued, None when no longer known. reason: why it
    waits, "" if SLURM gives none.
    """

    job_id: str
    state: str
    nodes: str
    restarts: int | None
    reason: str = ""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one node has."""

    gpus: int
    cpus: int
    memory_mb: int


def has_clients() -> bool:
    """Whether SLURM's client commands are installed here."""
    return shutil.which("sbatch") is not None and shutil.which("sinfo") is not None


def check_cluster(cluster: ClusterConfig) -> None:
    """Compare what a cluster file asks for with what the cluster has.

    Raises:
        ConfigError: no client, an unknown partition, too few nodes with enough GPUs, CPUs or memory, a time limit that
            the partition does not allow.
    """
    if not has_clients():
        raise ConfigError(
            "--cluster", cluster.executor, "there is no SLURM client (sbatch) on this machine",
            "Run on the cluster's login node, load its SLURM module, or use `--cluster local`.",
        )  # fmt: skip
    # sinfo writes the default partition as `main*`.
    partitions = {line.rstrip("*"): line.endswith("*") for line in _query("sinfo", "-h", "-o", "%P").split()}
    default = next((name for name, is_default in partitions.items() if is_default), None)
    partition = cluster.partition or default
    for name in (partition or "").split(","):
        if name not in partitions:
            raise ConfigError(
                "partition", partition, "the cluster has no such partition", did_you_mean(name, partitions)
            )
    _check_nodes(cluster, str(partition))
    _check_time(cluster, str(partition))


def _check_nodes(cluster: ClusterConfig, partition: str) -> None:
    nodes = parse_nodes(_query("sinfo", "-h", "-N", "-p", partition, "-o", "%N|%G|%c|%m"))
    if cluster.node_range[1] > len(nodes):
        raise ConfigError(
            "nodes", cluster.nodes, f"partition {partition!r} has {len(nodes)} nodes",
            "Ask for fewer, or name another partition.",
        )  # fmt: skip
    # The job starts on the fewest nodes of the range if no more are free, so that many must be large enough.
    need, cpus_asked = cluster.node_range[0], cluster.cpus_per_task * cluster.ranks_per_node
    memory_asked = (cluster.memory_gb or 0) * 1024
    wanted: list[tuple[str, object, str, list[int], float]] = [
        ("gpus_per_node", cluster.gpus_per_node, "GPUs", [n.gpus for n in nodes.values()], cluster.gpus_per_node),
        ("cpus_per_task", cluster.cpus_per_task, "CPUs", [n.cpus for n in nodes.values()], cpus_asked),
        ("memory_gb", cluster.memory_gb, "MB of memory", [n.memory_mb for n in nodes.values()], memory_asked),
    ]
    for field, value, what, have, asked in wanted:
        enough = sum(has >= asked for has in have)
        if enough < need:
            raise ConfigError(
                field, value,
                f"{need} nodes with {asked:.0f} {what} each are asked for, but in partition {partition!r} {enough} of "
                f"{len(have)} nodes have as many (the largest has {max(have, default=0)})",
                "Ask for less, or name another partition.",
            )  # fmt: skip


def _check_time(cluster: ClusterConfig, partition: str) -> None:
    limits = []
    for text in _query("sinfo", "-h", "-p", partition, "-o", "%l").split():
        match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
        if match is None:  # "infinite"
            return
        days, hours, minutes, seconds = (int(g or 0) for g in match.groups())
        limits.append(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    if limits and cluster.time_s > max(limits):
        raise ConfigError(
            "time", cluster.time, f"partition {partition!r} allows {max(limits) // 60} minutes at most",
            "Ask for less: the job resumes by itself after each time limit.",
        )  # fmt: skip


def check_submission(script: Path) -> None:
    """Have SLURM's controller check an sbatch file without submitting it.

    Raises:
        UserError: the controller refuses the job; the message quotes its reason.
    """
    done = subprocess.run(["sbatch", "--test-only", str(script)], capture_output=True, text=True)
    if done.returncode:
        problem = done.stderr.strip().replace("allocation failure: ", "").removeprefix("sbatch: error: ")
        raise UserError("--cluster", "sbatch", f"the cluster refuses the job: {problem}", "Correct the cluster file.")


def job_infos(job_ids: Sequence[str]) -> dict[str, JobInfo]:
    """The states of jobs, by id: from the controller while it remembers them, else from accounting where there is one.

    Ids that the cluster does not know are missing. Each task of a job array has an entry of its own.
    """
    wanted = sorted({job_id.split("_")[0] for job_id in job_ids})
    if not wanted or shutil.which("squeue") is None:
        return {}
    # NAME:WIDTH, and "|" between columns. -r gives each task of an array a row; -t all includes jobs that have ended.
    fields = "JobArrayID:40|,State:40|,NumNodes:20|,RestartCnt:20|,Reason:60"
    found = parse_queue(_query("squeue", "-h", "-r", "-t", "all", "-j", ",".join(wanted), "-O", fields, check=False))
    unknown = [job_id for job_id in wanted if not any(known.split("_")[0] == job_id for known in found)]
    if unknown:
        accounting = ("sacct", "-n", "-P", "-X", "-j", ",".join(unknown), "-o", "JobID,State,NNodes")
        found |= parse_accounting(_query(*accounting, check=False))
    return found


def parse_nodes(text: str) -> dict[str, Node]:
    """The nodes by name in rows `NAME|GRES|CPUS|MEMORY` of sinfo. A node of several partitions has a row for each.

    Raises:
        UserError: a row is of another form.
    """
    nodes = {}
    for row in text.splitlines():
        try:
            name, gres, cpus, memory = row.split("|")
            # sinfo puts a plus behind the smallest of several numbers.
            node = Node(gpus=gpus(parse_gres(gres)), cpus=int(cpus.rstrip("+")), memory_mb=int(memory.rstrip("+")))
        except ValueError:
            raise _not_understood("sinfo", row) from None
        nodes[name] = node
    return nodes


def parse_queue(text: str) -> dict[str, JobInfo]:
    """The jobs by id in rows `ID|STATE|NODES|RESTARTS|REASON` of squeue.

    Raises:
        UserError: a row is of another form.
    """
    found = {}
    for row in text.splitlines():
        try:
            job_id, state, nodes, restarts, reason = (cell.strip() for cell in row.split("|", 4))
            found[job_id] = JobInfo(
                job_id=job_id,
                state=state,
                nodes=nodes,
                restarts=int(restarts),
                reason="" if reason == "None" else reason,
            )
        except ValueError:
            raise _not_understood("squeue", row) from None
    return found


def parse_accounting(text: str) -> dict[str, JobInfo]:
    """The jobs by id in rows `ID|STATE|NODES` of sacct.

    Raises:
        UserError: a row is of another form.
    """
    found = {}
    for row in text.splitlines():
        try:
            job_id, state, nodes = row.split("|")
            # The state may be "CANCELLED by 1000".
            found[job_id] = JobInfo(job_id=job_id, state=state.split()[0], nodes=nodes, restarts=None)
        except (ValueError, IndexError):
            raise _not_understood("sacct", row) from None
    return found


def _not_understood(command: str, row: str) -> UserError:
    problem = f"answered with a row that is not understood: {row[:200]!r}"
    return UserError(
        "--cluster", command, problem, f"Run {command} by hand; a wrapper or plugin may add to its output."
    )


def _query(*command: str, check: bool = True) -> str:
    """Standard output of a client command, "" if it is not installed.

    Raises:
        UserError: it does not answer; with `check`, also if it fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return ""
    except subprocess.TimeoutExpired:
        raise UserError(
            "--cluster", command[0], "SLURM does not answer", "Try again later; see `scontrol ping`."
        ) from None
    if check and done.returncode:
        problem = f"SLURM does not answer ({done.stderr.strip()})"
        raise UserError("--cluster", command[0], problem, "Try again later; see `scontrol ping`.")
    return done.stdout
