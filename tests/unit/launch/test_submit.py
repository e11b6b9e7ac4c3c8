"""The sbatch text, rendered without SLURM."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from msdiff_dist.launch.cluster import ClusterConfig
from msdiff_dist.launch.submit import SlurmExecutor, make_executor, sbatch_text


def text_of(tasks: int = 1, **changes: Any) -> str:
    cluster = ClusterConfig(**{"shared": "/", "python": "python3", **changes})
    executor = make_executor(cluster, "faces", Path("/shared/runs/faces"), Path("/shared/runs/faces/launch/001/code"))
    assert isinstance(executor, SlurmExecutor)
    return sbatch_text(executor, tasks)


def test_every_field_reaches_the_text() -> None:
    text = text_of(
        partition="gpu", account="me", qos="high", constraint="a100", nodes=3, gpus_per_node=4, cpus_per_task=6,
        memory_gb=1.5, time="2:00:00", signal_delay_s=90, exclusive=True, sbatch={"mail-type": "FAIL", "hold": True},
        srun=("--cpu-bind=none",), setup=("module load cuda",), environment={"A": "b c"}, interface="ib0",
    )  # fmt: skip
    options = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert options >= {
        "partition=gpu", "account=me", "qos=high", "constraint=a100", "nodes=3", "ntasks-per-node=4",
        "gpus-per-node=4", "cpus-per-task=6", "mem=1536MB", "time=120", "signal=USR2@90", "exclusive", "requeue",
        "mail-type=FAIL", "hold", "job-name=faces", "output=/shared/runs/faces/logs/%j_0_log.out",
    }  # fmt: skip
    assert not any(option.startswith(("wckey", "gres")) for option in options)
    lines = text.splitlines()
    assert lines.index("module load cuda") < lines.index("export A='b c'")
    assert "export NCCL_SOCKET_IFNAME=ib0" in lines
    assert "export GLOO_SOCKET_IFNAME=ib0" in lines
    assert "export OMP_NUM_THREADS=6" in lines
    srun = shlex.split(next(line for line in lines if line.startswith("srun")))
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=6", "--cpu-bind=none", "--open-mode=append"} <= set(srun)
    assert srun[srun.index("python3") :][:4] == ["python3", "-u", "-m", "submitit.core._submit"]


def test_the_snapshot_comes_first_in_the_import_path() -> None:
    assert 'export PYTHONPATH=/shared/runs/faces/launch/001/code"${PYTHONPATH:+:$PYTHONPATH}"' in text_of()
    assert "export PYTHONSAFEPATH=1" in text_of()


def test_a_range_of_nodes_typed_gpus_a_container_and_an_array() -> None:
    text = text_of(
        tasks=5, nodes="2-4", gpus_per_node=8, gres="gpu:a100:8", container="run img", max_parallel=3, cpus_per_task=3
    )
    assert "#SBATCH --nodes=2-4\n" in text
    assert "#SBATCH --mincpus=24\n" in text
    assert "#SBATCH --ntasks" not in text
    assert "--ntasks-per-node=8 --cpus-per-task=3" in text
    assert "#SBATCH --gres=gpu:a100:8\n" in text
    assert "gpus-per-node" not in text
    assert "#SBATCH --array=0-4%3\n" in text
    assert "--open-mode=append run img python3 -u -m" in text


@pytest.mark.parametrize("changes", [{"gpus_per_node": 0, "tasks_per_node": 3}, {"gpus_per_node": 3}])
def test_one_task_for_each_rank(changes: dict[str, int]) -> None:
    assert "#SBATCH --ntasks-per-node=3\n" in text_of(**changes)
