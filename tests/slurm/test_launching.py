"""`msdiff launch`, `array`, `jobs`, `logs` and `attach` on a real cluster."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import msdiff_dist
from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import RECIPE, ClusterFile, Msdiff, losses

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize(
    ("changes", "arguments", "named", "remedy"),
    [
        ({"partition": "man"}, (), "partition = 'man'", "Did you mean 'main'"),
        ({"tasks_per_node": 1}, ("--gpus-per-node", 3), "gpus_per_node = 3", "Ask for less"),
        ({}, ("--nodes", 3), "nodes = '3'", "Ask for fewer"),
        ({"cpus_per_task": 5}, (), "cpus_per_task = 5", "Ask for less"),
        ({"memory_gb": 9}, (), "memory_gb = 9", "Ask for less"),
        ({"constraint": "h100"}, (), "Invalid feature specification", "Correct the cluster file"),
        ({"shared": "/usr"}, (), "--run-dir", "every node must see it"),
        ({"shared": "/nowhere"}, (), "shared = '/nowhere'", "every node sees"),
        ({"partitoin": "main"}, (), "partitoin", "Did you mean 'partition'"),
        ({}, ("--time", "0:01:00"), "--time = '0:01:00'", "lower signal_delay_s"),
        ({"time": 86400}, (), "reads 24:00:00 without quotes", "in quotes"),
        ({}, ("data.lanes=6",), "data.lanes = 6", "multiple of 4"),
        ({}, ("train.global_batch_size=3",), "train.global_batch_size", ""),
        ({}, ("train.lr=1",), "train.lr", ""),
    ],
)
def test_bad_input_is_refused_before_anything_is_written_or_submitted(
    slurm: SlurmCluster,
    cluster_file: ClusterFile,
    msdiff: Msdiff,
    tmp_path: Path,
    changes: dict[str, Any],
    arguments: tuple[object, ...],
    named: str,
    remedy: str,
) -> None:
    before, run = slurm.run("squeue", "-h", "-t", "all", "-o", "%A"), tmp_path / "run"
    status, printed = msdiff("launch", RECIPE, "--cluster", cluster_file(**changes), "--run-dir", run, *arguments)
    assert status == 2
    assert named in printed
    assert remedy in printed
    assert not run.exists()
    assert slurm.run("squeue", "-h", "-t", "all", "-o", "%A") == before


def test_without_a_client_the_remedy_is_named(
    cluster_file: ClusterFile, msdiff: Msdiff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    status, printed = msdiff("launch", RECIPE, "--cluster", cluster_file(), "--run-dir", tmp_path / "run")
    assert status == 2
    assert "no SLURM client" in printed
    assert "--cluster local" in printed


def test_two_nodes_give_the_losses_of_one_machine_and_edits_do_not_reach_a_queued_job(
    slurm: SlurmCluster, cluster_file: ClusterFile, msdiff: Msdiff, tmp_path: Path
) -> None:
    run, alone, source = tmp_path / "run", tmp_path / "alone", tmp_path / "source"
    shutil.copytree(Path(msdiff_dist.__file__).parent, source / "msdiff_dist")
    file, changes = cluster_file(sbatch={"hold": True}), ("train.steps=12", "train.precision=fp32")
    arguments = [str(RECIPE), *changes, "--cluster", file, "--run-dir", str(run)]
    planned = msdiff("launch", *arguments, "--dry-run")[1]
    command = [sys.executable, "-P", "-m", "msdiff_dist.cli.main", "launch", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    subprocess.run(command, env=environment, check=True)
    (source / "msdiff_dist/training/loop.py").write_text("raise RuntimeError('edited after the launch')")

    status, printed = msdiff("launch", *arguments)
    assert status == 2
    assert "of this run is still active" in printed
    record = json.loads((run / "launch/job.json").read_text())
    (job,) = record["job_ids"]
    submitted = (run / f"logs/{job}_submission.sh").read_text()
    assert submitted in planned
    assert "balance" in planned
    snapshot = run / "launch/001"
    assert yaml.safe_load((snapshot / "recipe.yaml").read_text())["train"]["steps"] == 12
    assert "torch" in json.loads((snapshot / "environment.json").read_text())["packages"]

    assert json.loads(msdiff("jobs", run, "--json")[1])["state"]["state"] == "PENDING"
    slurm.run("scontrol", "release", job)
    assert msdiff("train", RECIPE, *changes, "--nproc", 4, "--run-dir", alone)[0] == 0
    slurm.wait_job(job, "COMPLETED", "FAILED", "CANCELLED")
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    assert len(losses(run)) == 12

    shown = json.loads(msdiff("jobs", run, "--json")[1])
    assert (shown["step"], shown["total_steps"], shown["restarts"]) == (12, 12, 0)
    assert shown["state"]["state"] == "COMPLETED"
    printed = msdiff("logs", run)[1]
    assert [printed.index(f"==> rank {rank}:") for rank in range(4)] == sorted(
        printed.index(f"==> rank {rank}:") for rank in range(4)
    )
    assert "global_rank=3(4)" in msdiff("logs", run, "--rank", 3)[1]
    assert "step 12/12" in msdiff("logs", run, "-f")[1]
    assert msdiff("logs", run, "--rank", 4)[0] == 2
    assert "12/12" in msdiff("attach", run)[1]


@pytest.mark.slow
def test_a_sweep_is_a_job_array_with_one_table(
    slurm: SlurmCluster, cluster_file: ClusterFile, msdiff: Msdiff, tmp_path: Path
) -> None:
    sweep, folder = tmp_path / "rates.yaml", tmp_path / "rates"
    sweep.write_text(
        yaml.safe_dump({"recipe": str(RECIPE), "grid": {"optimizer.lr": [0.001, 1e-09]}, "max_parallel": 2})
    )
    file = cluster_file(nodes=1, tasks_per_node=1)
    arguments = (sweep, "train.steps=3", "--cluster", file, "--run-dir", folder)
    assert "#SBATCH --array=0-1%2" in msdiff("launch", *arguments, "--dry-run")[1]
    status, printed = msdiff("launch", *arguments, "--wait")
    assert status == 0, printed
    rows = [json.loads(line) for line in msdiff("jobs", folder, "--json")[1].splitlines()]
    assert [Path(row["run"]).name for row in rows] == ["000_lr=0.001", "001_lr=1e-09"]
    assert [row["step"] for row in rows] == [3, 3]
    assert rows[0]["loss"] < rows[1]["loss"]
    assert "001_lr=1e-09" in msdiff("jobs", folder)[1]


def test_parts_of_a_data_job_run_as_an_array_and_only_once(
    slurm: SlurmCluster, cluster_file: ClusterFile, msdiff: Msdiff, tmp_path: Path
) -> None:
    folder, recipe = tmp_path / "job", tmp_path / "{part}.yaml"
    (tmp_path / "0.yaml").write_text(RECIPE.read_text())
    arguments = (
        "array",
        "--parts",
        2,
        "--cluster",
        cluster_file(),
        "--folder",
        folder,
        "--wait",
        "--",
        "flops",
        recipe,
    )
    assert msdiff(*arguments)[0] == 1
    status = json.loads(msdiff("jobs", folder, "--json")[1])
    assert (status["step"], status["total_steps"]) == (1, 2)
    assert status["state"]["state"] == "1 COMPLETED, 1 FAILED"
    (tmp_path / "1.yaml").write_text(RECIPE.read_text())
    assert msdiff(*arguments)[0] == 0
    assert "all 2 parts are done already" in msdiff(*arguments)[1]
    assert len(list((folder / "logs").glob("*_log.out"))) == 3


@pytest.mark.slow
def test_the_guides_plain_sbatch_file_trains(slurm: SlurmCluster, tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "slurm/README.md").read_text()
    script = guide[guide.index("#!/bin/bash") :].partition("```")[0]
    for written, here in (
        ("--ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8", "--ntasks-per-node=1"),
        ("--cpus-per-task=8", "--cpus-per-task=1"),
        ("recipes/celebahq256_ldm_3stage.yaml", f"{RECIPE} train.steps=3"),
        ("/shared/runs/faces", str(tmp_path / "run")),
        ("exec msdiff", f"exec {sys.executable} -m msdiff_dist.cli.main"),
    ):
        assert written in script
        script = script.replace(written, here)
    (tmp_path / "job.sh").write_text(script)
    job = slurm.run("sbatch", "--parsable", f"--output={tmp_path}/out", str(tmp_path / "job.sh")).strip()
    state = slurm.wait_job(job, "COMPLETED", "FAILED", "CANCELLED", timeout_s=180)
    assert state == "COMPLETED", (tmp_path / "out").read_text()
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
