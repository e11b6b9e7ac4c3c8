"""The plan that a dry run prints, with the speed to expect; dry runs where no cluster is at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from msdiff_dist.cli.main import app
from msdiff_dist.distributed.plan_report import size
from msdiff_dist.errors import ConfigError, UserError
from msdiff_dist.launch.cluster import ClusterConfig
from msdiff_dist.launch.launcher import Run, plan_report_of, show_plan
from msdiff_dist.launch.restarts import Diary
from msdiff_dist.recipe import load_recipe

RECIPE = Path(__file__).parents[3] / "recipes/debug.yaml"


def test_speed_is_that_of_the_last_start_by_ranks_and_balance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cluster = (
        Run(load_recipe(RECIPE, ["train.precision=fp32"]), tmp_path),
        ClusterConfig(executor="local", gpus_per_node=4),
    )
    assert "images_per_second" not in plan_report_of(run, cluster, 4)
    for job, ranks, step in (("1", 12, 0), ("2", 2, 5)):
        Diary(tmp_path / "launch/starts.jsonl", job).write_start(ranks, step)
    lines = [{"step": n, "images_per_second": 900.0 if n <= 5 else 100.0} for n in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    on_two, on_four = (plan_report_of(run, cluster, ranks) for ranks in (2, 4))
    assert on_two["images_per_second"] == pytest.approx(100)
    assert on_four["images_per_second"] == pytest.approx(100 * 2 * on_four["balance"] / on_two["balance"])

    show_plan(run, cluster)
    printed = capsys.readouterr().out
    assert f"{on_four['images_per_second']:.3g} img/s expected" in printed
    peak = max(rank["peak_bytes"]["total"] for rank in on_four["ranks"])
    assert f"peak {size(peak)} a rank" in printed
    assert size(max(rank["state_bytes"] for rank in on_four["ranks"])) in printed


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster file for a machine without SLURM's commands; the shared folder it names is not here either."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "cluster.yaml"
    path.write_text("{shared: /no/such/share, partition: night, nodes: 2, gpus_per_node: 6, gres: 'gpu:h100:6'}")
    return path


def dry(cluster: Path | str, *arguments: str) -> Result:
    command = ["launch", str(RECIPE), *arguments, "--cluster", str(cluster), "--dry-run"]
    result = CliRunner().invoke(app, command)
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_a_dry_run_needs_no_cluster_and_writes_nothing(away: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = dry(away, "--run-dir", "/no/such/share/runs/faces", "--time", "2-12")
    assert "2 nodes x 6 ranks" in result.stdout
    for option in ("partition=night", "nodes=2", "ntasks-per-node=6", "gres=gpu:h100:6", "time=3600", "requeue"):
        assert f"#SBATCH --{option}\n" in result.stdout
    assert "/no/such/share/runs/faces/launch/001/code" in result.stdout
    assert "partition, nodes and limits are not compared" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert "no sbatch text" in dry("local", "--run-dir", "run").stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_away_from_the_cluster_refuses_what_a_launch_refuses(away: Path, tmp_path: Path) -> None:
    run = ("--run-dir", "/no/such/share/run")
    with pytest.raises(ConfigError, match=r"data\.lanes = 16: is not a multiple of the 12 ranks"):
        dry(away, *run, "data.lanes=16")
    with pytest.raises(ConfigError, match=r"--run-dir.*does not lie under the cluster's shared folder"):
        dry(away, "--run-dir", str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"gpus_per_node is 4"):
        dry(away, *run, "--gpus-per-node", "4")
    # Submitting needs the cluster.
    result = CliRunner().invoke(app, ["launch", str(RECIPE), "--cluster", str(away), *run])
    assert isinstance(result.exception, ConfigError)
    assert "no SLURM client" in str(result.exception)
