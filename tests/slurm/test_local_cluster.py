"""The cluster of these tests is a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import submitit

from tests.slurm.cluster import SlurmCluster

pytestmark = pytest.mark.slurm


def test_srun_reaches_every_node_with_its_gpus(slurm: SlurmCluster) -> None:
    shell = "echo $(hostname) $SLURM_PROCID $SLURM_LOCALID $CUDA_VISIBLE_DEVICES"
    printed = slurm.run("srun", "-N2", "--ntasks-per-node=2", "--gpus-per-node=2", "bash", "-c", shell)
    assert sorted(printed.splitlines()) == ["node0 0 0 0,1", "node0 1 1 0,1", "node1 2 0 0,1", "node1 3 1 0,1"]


def test_more_gpus_than_there_are_is_refused(slurm: SlurmCluster) -> None:
    with pytest.raises(RuntimeError, match="Requested node configuration is not available"):
        slurm.run("sbatch", "--gpus-per-node=3", "--output=/dev/null", "--wrap", "true")


def test_a_batch_job_ends_in_the_accounting(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = slurm.run("sbatch", "--parsable", f"--output={tmp_path}/out", "--wrap", "hostname").strip()
    slurm.wait_job(job, "COMPLETED")
    assert (tmp_path / "out").read_text() == "node0\n"


def test_submitit_returns_every_tasks_result(slurm: SlurmCluster, tmp_path: Path) -> None:
    def who() -> tuple[str, int]:
        environment = submitit.JobEnvironment()
        return environment.hostname, environment.global_rank

    executor = submitit.SlurmExecutor(tmp_path)
    executor.update_parameters(time=1, nodes=2, ntasks_per_node=2)
    assert executor.submit(who).results() == [("node0", 0), ("node0", 1), ("node1", 2), ("node1", 3)]
