"""From a cluster file to a submitted job: the only module that builds submitit's executors."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError
from submitit.helpers import clean_env

from msdiff_dist.errors import ConfigError, UserError
from msdiff_dist.launch import slurm
from msdiff_dist.launch.cluster import ClusterConfig

# submitit limits time-outs, and takes every signal of a short job for one. `max_restarts` is the limit here instead.
_NO_LIMIT = 100_000

Task = Callable[[], Any]


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's executor, which can also be made without a SLURM client, to render the sbatch text."""

    @classmethod
    def affinity(cls) -> int:
        """Positive: submitit's own is -1 where srun is missing, and then it refuses to make an executor."""
        return 1


def make_executor(cluster: ClusterConfig, name: str, folder: Path, code: Path) -> submitit.Executor:
    """The submitit executor for a cluster file.

    Args:
        name: the job's name.
        folder: the folder of the run or sweep; its `logs/` get the ranks' logs, the sbatch file and submitit's pickles.
        code: the folder the job imports this package from.
    """
    logs = folder.resolve() / "logs"
    setup = [*cluster.setup, *_exports(cluster, code)]
    if cluster.executor == "debug":
        return submitit.DebugExecutor(logs)
    if cluster.executor == "local":
        local = submitit.LocalExecutor(logs, max_num_timeout=_NO_LIMIT, python=_python(cluster))
        local.update_parameters(
            timeout_min=cluster.time_s / 60,
            signal_delay_s=cluster.signal_delay_s,
            gpus_per_node=cluster.gpus_per_node,
            tasks_per_node=cluster.ranks_per_node,
            stderr_to_stdout=True,
            setup=[*_background(logs), *setup],
        )
        return local
    executor = SlurmExecutor(logs, max_num_timeout=_NO_LIMIT, python=_python(cluster))
    executor.update_parameters(**_slurm_parameters(cluster, name), setup=setup)
    return executor


def _background(logs: Path) -> list[str]:
    """Shell lines that detach the job from the terminal: its output, and the signals of Ctrl-C and of closing it."""
    return [f"exec </dev/null >>{shlex.quote(str(logs / 'controller.log'))} 2>&1", "trap '' HUP INT"]


def _python(cluster: ClusterConfig) -> str:
    python = shlex.quote(cluster.python)
    return f"{cluster.container} {python}" if cluster.container else python


def _exports(cluster: ClusterConfig, code: Path) -> list[str]:
    """Shell lines that set the ranks' environment, `environment` of the cluster file last."""
    # Without PYTHONSAFEPATH, `python -m` puts the current folder, perhaps the sources, before the snapshot in sys.path.
    variables = {"OMP_NUM_THREADS": str(cluster.cpus_per_task), "PYTHONSAFEPATH": "1"}
    if cluster.interface:
        variables |= {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    lines = [f"export {key}={shlex.quote(value)}" for key, value in {**variables, **cluster.environment}.items()]
    return [*lines, f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"']


def _slurm_parameters(cluster: ClusterConfig, name: str) -> dict[str, Any]:
    low, high = cluster.node_range
    ranks, cpus = cluster.ranks_per_node, cluster.cpus_per_task
    # Since Slurm 22.05 srun no longer takes the CPUs per task over from sbatch.
    srun = [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1", "--open-mode=append", *cluster.srun]
    further: dict[str, Any] = {"requeue": True}
    tasks: dict[str, Any] = {"ntasks_per_node": ranks, "cpus_per_task": cpus}
    if low < high:
        # With tasks in the sbatch options, a job that once ran on `high` nodes asks for their number of tasks from then
        # on and never restarts on fewer. So the job asks for CPUs only, and srun for the tasks.
        tasks = {}
        further |= {"nodes": f"{low}-{high}", "mincpus": ranks * cpus}
        srun = [f"--ntasks-per-node={ranks}", *srun]
    return {
        "job_name": name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "time": math.ceil(cluster.time_s / 60),  # minutes
        "signal_delay_s": cluster.signal_delay_s,
        "nodes": high,
        **tasks,
        "gpus_per_node": None if cluster.gres or not cluster.gpus_per_node else cluster.gpus_per_node,
        "gres": cluster.gres,
        "mem": f"{math.ceil(cluster.memory_gb * 1024)}MB" if cluster.memory_gb else None,
        "exclusive": cluster.exclusive or None,  # False would be written out as a value
        "array_parallelism": cluster.max_parallel,
        "wckey": None,  # submitit's default is a key that a cluster which enforces keys refuses
        "stderr_to_stdout": True,
        "srun_args": srun,
        "additional_parameters": {**further, **cluster.sbatch},
    }


def sbatch_text(executor: submitit.Executor, tasks: int) -> str:
    """Exactly what would be given to sbatch, for one job or for an array of `tasks`."""
    assert isinstance(executor, SlurmExecutor)
    # submitit sets `map_count` itself when it submits an array; here it goes into a copy.
    if tasks > 1:
        executor = _copy(executor)
        executor.parameters["map_count"] = tasks
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _copy(executor: SlurmExecutor) -> SlurmExecutor:
    copied = SlurmExecutor(executor.folder, max_num_timeout=executor.max_num_timeout, python=executor.python)
    copied.update_parameters(**executor.parameters)
    return copied


def check_job(cluster: ClusterConfig, folder: Path, executor: submitit.Executor, tasks: int) -> None:
    """Check with the SLURM cluster whether it would accept and could run a job. Writes nothing.

    Raises:
        ConfigError, UserError: naming the field and the remedy.
    """
    slurm.check_cluster(cluster)
    if not Path(str(cluster.shared)).is_dir():
        raise ConfigError("shared", cluster.shared, "no such folder", "Name a folder that every node sees.")
    check_folder(cluster, folder)
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(sbatch_text(executor, tasks))
        script.flush()
        slurm.check_submission(Path(script.name))


def check_folder(cluster: ClusterConfig, folder: Path) -> None:
    """Refuse a folder of a run or of data jobs that the nodes of a SLURM cluster do not share.

    Raises:
        ConfigError: it does not lie under the cluster's shared folder.
    """
    if not folder.resolve().is_relative_to(Path(str(cluster.shared)).resolve()):
        raise ConfigError(
            "--run-dir", str(folder), f"does not lie under the cluster's shared folder {cluster.shared}",
            "Name a run folder there: every node must see it.",
        )  # fmt: skip


def submit(executor: submitit.Executor, tasks: Sequence[Task]) -> list[submitit.Job[Any]]:
    """Submit one job, or several as a job array where the executor has arrays. The debug executor runs them at once.

    Raises:
        UserError: the cluster refuses the job; the message quotes sbatch.
    """
    try:
        with _outside_any_job():
            jobs = executor.submit_array(list(tasks))
    except FailedJobError as e:
        problem = f"the cluster refuses the job: {' '.join(str(e).split())}"
        raise UserError("--cluster", "sbatch", problem, "Correct the cluster file.") from None
    if isinstance(executor, submitit.DebugExecutor):
        for job in jobs:
            job.results()
    return jobs


@contextlib.contextmanager
def _outside_any_job() -> Iterator[None]:
    """Inside a job, hide its SLURM variables, which sbatch would take for options of the new job."""
    where = os.environ.get("SLURM_CONF")
    with clean_env() if "SLURM_JOB_ID" in os.environ else contextlib.nullcontext():
        if where:
            os.environ["SLURM_CONF"] = where
        yield
