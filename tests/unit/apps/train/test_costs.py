"""Weighted costs and the table of costs, compared with sums written out here and with the paper's ratios."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from msdiff_dist.apps.train.costs import cost_report, petaflops_after, step_petaflops, steps_within
from msdiff_dist.apps.train.plan import plan_phases, plan_run
from msdiff_dist.cli.main import app
from msdiff_dist.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[4]


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(ROOT / f"recipes/{name}.yaml", overrides)


def test_intervals_of_the_three_systems_lie_alike_on_the_papers_clock() -> None:
    for name in ("celebahq256_ldm_3stage", "cifar10_dpm_3stage", "cifar10_edm_3stage"):
        shares = cost_report(recipe_of(name)).interval_K
        assert shares == pytest.approx([0.442, 0.189, 0.369], abs=0.005)
        assert sum(shares) == pytest.approx(1)


def test_means_are_weighted_sums() -> None:
    report = cost_report(recipe_of("debug", "stages.sampling=[3,2,1]", "preview.sampler.steps=10"))
    per_stage = [(report.costs.encoder.macs + d.macs) / 1e9 for d in report.costs.decoders]
    assert report.training_K == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert report.gmacs(report.training_K) == pytest.approx(sum(per_stage[k] * (3 - k) / 6 for k in range(3)))
    assert report.gmacs(report.interval_K) == pytest.approx(
        0.442 * per_stage[0] + 0.189 * per_stage[1] + 0.369 * per_stage[2]
    )
    # DDIM's ten timesteps are 1, 101, ..., 901: five below 442, two below 631.
    assert report.sampling_K == (0.5, 0.2, 0.3)
    assert report.evaluations == 10


def test_heun_evaluates_twice_a_step_but_the_last() -> None:
    report = cost_report(recipe_of("cifar10_edm_3stage"))
    assert report.evaluations == 35
    assert sum(report.sampling_K) == pytest.approx(1)


def test_training_counts_every_sample_forward_and_backward() -> None:
    recipe = recipe_of("debug", "train.steps=7", "train.global_batch_size=30")
    plan = plan_run(recipe, 2)
    per_step = step_petaflops(plan.quotas, plan.cost_K)
    assert per_step == pytest.approx(sum(10 * macs * 2 * 3 for macs in plan.cost_K) / 1e15)
    report = cost_report(recipe)
    assert report.petaflops == pytest.approx(7 * per_step)
    by_ranks = recipe_of("debug", "train.global_batch_size=null", "train.micro_batch_size=6")
    assert cost_report(by_ranks).petaflops is None, "batch by the number of ranks"


CHANGING = ("train.steps=10", "train.global_batch_size=30", "grow.at=3", "stages.end={at: [null, 6, null]}")


def test_each_step_costs_what_its_phase_trains() -> None:
    recipe = recipe_of("debug", *CHANGING)
    report, planned = cost_report(recipe), plan_phases(recipe, 2)
    of_stage_K = [report.costs.encoder.macs + d.macs for d in report.costs.decoders]
    unified = report.unified_macs or 0
    macs = 3 * [30 * unified] + 3 * [10 * sum(of_stage_K)] + 4 * [15 * (of_stage_K[0] + of_stage_K[2])]
    for step in range(1, 11):
        spent = 6 * sum(macs[:step]) / 1e15
        assert petaflops_after(planned, step) == pytest.approx(spent)
        assert steps_within(planned, None, spent) == pytest.approx(step)
    longer = 6 * (sum(macs) + 5 * macs[-1]) / 1e15
    assert steps_within(planned, None, longer) == pytest.approx(15), "the last phase goes on"
    assert report.petaflops == pytest.approx(6 * sum(macs) / 1e15)
    fields = report.fields()
    assert [(p["first"], p["last"], p["about"]) for p in fields["phases"]] == [
        (1, 3, "unified"), (4, 6, "3 stages"), (7, 10, "3 stages without 1"),
    ]  # fmt: skip
    assert [p["petaflops"] for p in fields["phases"]] == pytest.approx([6 * sum(macs[:3]) / 1e15,
        6 * sum(macs[3:6]) / 1e15, 6 * sum(macs[6:]) / 1e15])  # fmt: skip
    # By interval, as the paper counts: the stage that has ended has none.
    of_pair = (0.442 * of_stage_K[0] + 0.369 * of_stage_K[2]) / (0.442 + 0.369)
    by_interval = [unified, report.gmacs(report.interval_K) * 1e9, of_pair]
    assert [p["equivalent_gmacs"] * 1e9 for p in fields["phases"]] == pytest.approx(by_interval)
    assert report.paper_petaflops == pytest.approx((3 * unified + 3 * by_interval[1] + 4 * of_pair) / 1e15)
    assert fields["equivalent_gmacs"] == cost_report(recipe_of("debug")).fields()["equivalent_gmacs"]
    assert cost_report(recipe_of("debug")).fields()["phases"] == []
    table = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["flops", str(ROOT / "recipes/debug.yaml"), *CHANGING])
    assert "steps 7-10: 3 stages without 1" in " ".join(table.stdout.split())


def test_unified_counterpart() -> None:
    stages, unified = cost_report(recipe_of("cifar10_dpm_3stage")), cost_report(recipe_of("cifar10_dpm_unified"))
    assert stages.unified_macs == unified.unified_macs
    assert unified.gmacs([1.0]) == pytest.approx((unified.unified_macs or 0) / 1e9)
    separate = dataclasses.replace(recipe_of("debug").model, share_encoder=False, encoder_channels=(24, 16, 8))
    assert cost_report(dataclasses.replace(recipe_of("debug"), model=separate)).unified_macs is None


def test_flops_prints_every_weighting() -> None:
    printed = CliRunner().invoke(app, ["flops", str(ROOT / "recipes/celebahq256_ldm_3stage.yaml"), "--json"])
    fields = json.loads(printed.stdout)
    assert fields["equivalent_gmacs"] == pytest.approx(90.04, abs=0.01)
    assert fields["unified_gmacs"] == pytest.approx(101.20, abs=0.01)
    assert fields["equivalent_gmacs_training"] == pytest.approx((120.44 + 84.15 + 56.64) / 3, abs=0.01)
    assert fields["sampling_evaluations"] == 50
    table = CliRunner().invoke(app, ["flops", str(ROOT / "recipes/fashion_mnist_edm_3stage.yaml")])
    assert table.exit_code == 0
    assert "decoder 2" in table.stdout
    assert fields["of_unified"]["training"] == pytest.approx(fields["equivalent_gmacs_training"] / 101.20, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "ratio"), [("celebahq256_ldm_3stage_official_attention", 0.867), ("celebahq256_ldm_3stage", 0.8897)]
)
def test_the_ldm_system_has_the_papers_ratio_by_interval(name: str, ratio: float) -> None:
    report = cost_report(recipe_of(name))
    assert report.of_unified(report.interval_K) == pytest.approx(ratio, abs=5e-4)


def test_a_training_sample_of_edm_costs_what_its_normal_distribution_says() -> None:
    """ln sigma is normal(-1.2, 1.2): most samples fall into the stage with the widest decoder."""
    report = cost_report(recipe_of("celeba32_edm_3stage"))
    unified = cost_report(recipe_of("celeba32_edm_unified"))
    below = [0.5 * (1 + math.erf((math.log(s) + 1.2) / 1.2 / math.sqrt(2))) for s in (2.5103, 7.6577)]
    shares = [below[0], below[1] - below[0], 1 - below[1]]
    macs = sum(
        share * (report.costs.encoder.macs + d.macs) for share, d in zip(shares, report.costs.decoders, strict=True)
    )
    ratio = macs / (unified.costs.encoder.macs + unified.costs.decoders[0].macs)
    assert report.of_unified(report.training_K) == pytest.approx(ratio, rel=1e-3)
    # 430k steps instead of 570k: a whole training costs a quarter more than the baseline's.
    assert ratio * 430 / 570 == pytest.approx(1.25, abs=0.005)
    assert (report.petaflops or 0) / (unified.petaflops or 1) == pytest.approx(ratio * 430 / 570, rel=1e-3)


def test_table_of_costs_has_the_papers_ratios() -> None:
    spec = importlib.util.spec_from_file_location("cost_table", ROOT / "tools/cost_table.py")
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    names = ["cifar10_dpm_3stage", "cifar10_dpm_unified", "celeba32_edm_3stage", "celeba32_edm_unified",
             "celebahq256_ldm_3stage_official_attention", "celebahq256_ldm_unified"]  # fmt: skip
    rows = {row[0]: row for row in tool.table([recipe_of(name) for name in names])}
    ratios = {name: float(row[5].rstrip("%")) for name, row in rows.items()}
    assert list(rows)[:2] == ["celeba32_edm_unified", "celeba32_edm_3stage"], "the baseline first"
    for name, paper in zip(names[::2], (59, 82, 30), strict=True):
        assert ratios[name] == pytest.approx(paper, abs=1)
    assert all(ratios[name] == 100 for name in names[1::2])


def test_frozen_parts_cost_less_and_other_stages_samples_nothing() -> None:
    recipe = recipe_of("debug", "train.freeze=[shared,stages.1,stages.2]", "stages.sampling=[3,2,1]")
    report, plan = cost_report(recipe), plan_run(recipe, 2)
    assert report.training_K == (1, 0, 0)
    assert plan.placement.stages_of_rank == ((0,), (0,))
    fields, whole = report.fields(), cost_report(recipe_of("debug")).fields()
    assert fields["trained_params"] == fields["decoders"][0]["params"] == fields["decoders"][0]["trained_params"]
    assert whole["trained_params"] == whole["total_params"] == fields["total_params"]
    assert report.petaflops == pytest.approx(recipe.train.steps * step_petaflops(plan.quotas, plan.cost_K))
    assert fields["unified_gmacs"] == whole["unified_gmacs"]
