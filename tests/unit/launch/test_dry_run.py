"""The plan that a dry run prints, with the speed to expect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from msdiff_dist.distributed.plan_report import size
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
