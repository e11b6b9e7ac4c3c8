"""`msdiff plan` on shipped recipes: balance, shares of work, placements by hand, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from msdiff_dist.cli.main import app
from msdiff_dist.errors import ConfigError, PlacementError
from msdiff_dist.recipe import load_recipe

RECIPES = Path(__file__).parents[3] / "recipes"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def report(*arguments: str) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("world_size", [3, 13, 1024])
def test_paper_recipe_balances(world_size: int) -> None:
    plan = report(str(RECIPES / "celebahq256_ldm_3stage.yaml"), "--world-size", str(world_size))
    assert plan["world_size"] == world_size
    assert plan["balance"] >= 0.95
    assert [s["work_share"] for s in plan["stages"]] == pytest.approx([0.461, 0.322, 0.217], abs=1e-3)
    assert sorted({r for s in plan["stages"] for r in s["ranks"]}) == list(range(world_size))
    batch = plan["global_batch_size"]
    for k in range(3):
        assert sum(r["samples"].get(str(k), 0) for r in plan["ranks"]) == batch // 3
    assert all(r["state_bytes"] > 0 for r in plan["ranks"])
    assert plan["bytes_per_step"]["routed"] > 0
    assert bool(plan["warnings"]) == (96 % world_size != 0)


def test_without_a_number_of_ranks_it_plans_for_this_machine() -> None:
    result = CliRunner().invoke(app, ["plan", str(RECIPES / "quickstart.yaml"), "--json"])
    here = max(1, torch.cuda.device_count())
    assert json.loads(result.stdout)["world_size"] == here
    (line,) = result.stderr.splitlines()
    assert "this machine's " + ("GPU" if torch.cuda.is_available() else "CPU") in line
    assert "msdiff train quickstart.yaml" in line
    assert result.stdout.strip() == run(str(RECIPES / "quickstart.yaml"), "--world-size", str(here), "--json").strip()
    with pytest.raises(ConfigError, match=r"Give --world-size, or both --nodes and --gpus-per-node"):
        run(str(RECIPES / "quickstart.yaml"), "--nodes", "2")


def test_work_follows_the_timesteps_where_sampling_is_uniform() -> None:
    recipe = str(RECIPES / "celebahq256_ldm_3stage.yaml")
    plan = report(recipe, "stages.sampling=uniform", "train.micro_batch_size=500", "--world-size", "2")
    assert [s["work_share"] for s in plan["stages"]] == pytest.approx([0.59, 0.18, 0.23], abs=0.006)


def test_explicit_placement_and_tables() -> None:
    recipe = str(RECIPES / "quickstart.yaml")
    explicit = "parallel.placement=[[0],[0,1],[2]]"
    assert [r["stages"] for r in report(recipe, explicit, "--world-size", "3")["ranks"]] == [[0], [0, 1], [2]]
    assert "balance" in run(recipe, explicit, "--world-size", "3")


def test_impossible_plans_are_refused() -> None:
    recipe = str(RECIPES / "quickstart.yaml")
    with pytest.raises(PlacementError, match=r"parallel.placement = .* 2 ranks and there are 3"):
        run(recipe, "parallel.placement=[[0],[1,2]]", "--world-size", "3")
    with pytest.raises(PlacementError, match=r"train.global_batch_size = \d+: is too small"):
        run(recipe, "--world-size", "5000")
    with pytest.raises(ConfigError, match=r"parallel.zero_decoders = 3"):
        run(recipe, "parallel.zero_decoders=3", "--world-size", "3")
    with pytest.raises(ConfigError, match=r"train.micro_batch_size = 0: must be at least 1"):
        run(recipe, "train.micro_batch_size=0", "train.global_batch_size=null", "--world-size", "3")


def test_plan_for_a_gpu() -> None:
    recipe = str(RECIPES / "quickstart.yaml")
    plan = report(recipe, "--nodes", "2", "--gpus-per-node", "2", "--gpu", "rtx4090")
    assert plan["gpu"]["fits"]
    assert plan["largest_micro_batch"] > 72 / 4
    assert plan["step_seconds"] > max(rank["compute_seconds"] for rank in plan["ranks"]) > 0
    assert plan["lr"] == load_recipe(recipe).optimizer.lr
    printed = run(recipe, "--world-size", "4", "--gpu", "memory=1.6,tflops=10,bandwidth=100")
    assert "does not fit" in printed
    with pytest.raises(ConfigError, match=r"--gpu = 'h100': no GPU of this name is known"):
        run(recipe, "--world-size", "4", "--gpu", "h100")
