"""`msdiff stages design` on digits: what it refuses, what it makes of measurements, and a whole design."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from msdiff_dist.apps.design.probes import Probe, plan_probes
from msdiff_dist.apps.train.costs import step_petaflops
from msdiff_dist.apps.train.plan import plan_run
from msdiff_dist.recipe import load_recipe, recipe_mapping
from tests.integration.conftest import ROOT, Msdiff

pytestmark = pytest.mark.integration

QUICKSTART = ROOT / "recipes/quickstart.yaml"


def _changes(digits: Path) -> list[str]:
    return [
        f"data.shards={digits}",
        "validation.fraction=0.1",
        "model.encoder_channels=16",
        "model.decoder_channels=[24,16,8]",
        "model.num_head_channels=4",
        "model.norm_groups=4",
        "train.precision=fp32",
        "train.global_batch_size=24",
        "train.threads=1",
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--budget", "1e-6"], "leaves 1 steps"),
        (["--budget", "0"], "--budget"),
        (["--budget", "1", "--probe-share", "2"], "--probe-share"),
        (["--budget", "1", "--max-stages", "11"], "max"),
        (["--budget", "1", "--plot", "why.txt"], "--plot"),
        (["--budget", "1", "grow.at=10"], "grow"),
        (["--budget", "1", "stages.end.at=[null,null,10]"], "stages.end"),
        (["--budget", "1", "model.share_encoder=false", "model.encoder_channels=[24,16,8]"], "model.family"),
    ],
)
def test_what_cannot_be_designed_is_refused(
    msdiff: Msdiff, digits: Path, tmp_path: Path, options: list[str], named: str
) -> None:
    out = tmp_path / "designed.yaml"
    ended = msdiff("stages", "design", QUICKSTART, *_changes(digits), *options, "--out", out)
    assert ended.status == 2
    assert named in ended.output
    assert not list(tmp_path.iterdir())


def test_an_existing_recipe_is_kept(msdiff: Msdiff, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    ended = msdiff("stages", "design", QUICKSTART, *_changes(digits), "--budget", "1", "--out", out)
    assert ended.status == 2
    assert out.read_text() == "mine"


def _measure(probes: list[Probe]) -> None:
    """Fill the probes' folders: losses fall with width, and in intervals, near the data and nowhere else."""
    for probe in probes:
        probe.folder.mkdir(parents=True)
        (probe.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_mapping(probe.recipe)))
        validation, steps = probe.recipe.validation, probe.recipe.train.steps
        assert validation is not None
        with (probe.folder / "metrics.jsonl").open("w") as file:
            for step in [*range(validation.every, steps, validation.every), steps]:
                images = step * 24
                gain = np.linspace(0.8, 0.0, 10)
                own = np.linspace(0.3, 0.0, 10) if probe.intervals > 1 else np.zeros(10)
                loss = 0.01 + 5 * probe.width**-gain * images**-0.5 * 0.2**own
                line = {"step": step, "images_seen": images, "validation": {"loss_per_bin": loss.tolist()}}
                file.write(json.dumps(line) + "\n")


def test_measurements_become_a_recipe(msdiff: Msdiff, digits: Path, tmp_path: Path) -> None:
    """Probes whose losses fall with width near the data and nowhere else: the widest decoder is designed there."""
    recipe, budget, out = load_recipe(QUICKSTART, _changes(digits)), 0.04, tmp_path / "designed.yaml"
    probes = plan_probes(recipe, budget, 0.05, 1, tmp_path / "designed")
    assert sum(p.petaflops for p in probes) == pytest.approx(0.05 * budget, rel=0.02)
    _measure(probes)
    options = ["--budget", str(budget), "--world-size", "2", "--out", out, "--json", "--plot", tmp_path / "why.png"]
    ended = msdiff("stages", "design", QUICKSTART, *_changes(digits), *options)
    assert ended.status == 0, ended.output
    found = json.loads(ended.output)
    assert found["laws"]["relative_error"] < 0.01
    assert found["chosen"]["stages"] > 1
    widths = found["chosen"]["decoder_channels"]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]
    assert found["chosen"]["predicted_loss"] <= min(d["predicted_loss"] for d in found["designs"])
    assert (tmp_path / "why.png").stat().st_size > 10_000

    written = load_recipe(out)
    assert list(written.model.decoder_channels) == widths
    plan = plan_run(written, 2)
    spent = step_petaflops(plan.quotas, plan.cost_K) * written.train.steps
    assert spent == pytest.approx(budget * found["chosen"]["balance"], rel=0.02)
    assert yaml.safe_load(out.read_text())["data"]["shards"] == str(digits)


def test_equal_decoders_take_two_probes(msdiff: Msdiff, digits: Path, tmp_path: Path) -> None:
    """Short intervals help near the data alone: the first stage is the shortest, and all decoders are alike."""
    recipe, out = load_recipe(QUICKSTART, _changes(digits)), tmp_path / "designed.yaml"
    probes = plan_probes(recipe, 0.04, 0.05, 1, tmp_path / "designed", equal_decoders=True)
    assert [(p.name, p.width) for p in probes] == [("unified", 1.0), ("intervals_16", 1.0)]
    assert sum(p.petaflops for p in probes) == pytest.approx(0.05 * 0.04, rel=0.02)
    _measure(probes)
    options = ["--budget", "0.04", "--equal-decoders", "--out", out, "--json", "--plot", tmp_path / "why.png"]
    ended = msdiff("stages", "design", QUICKSTART, *_changes(digits), *options)
    assert ended.status == 0, ended.output
    found = json.loads(ended.output)
    # Nothing was measured of widths, so nothing is said of the recipe's own decoders, which are unequal.
    assert found["given"] is None
    assert sorted(found["laws"]) == ["floor", "length", "relative_error", "samples"]
    written = load_recipe(out)
    assert written.stages.num_stages > 1
    assert set(written.model.decoder_channels) == {16}
    edges = [0, *written.stages.boundaries, 1000]
    assert min(np.diff(edges)) == edges[1]


@pytest.mark.slow
def test_a_design_is_measured_and_trains(msdiff: Msdiff, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "designed.yaml"
    options = ["--budget", "0.004", "--probe-share", "0.4", "--out", out, "--max-stages", "3"]
    ended = msdiff("stages", "design", QUICKSTART, *_changes(digits), *options)
    assert ended.status == 0, ended.output
    assert "(chosen)" in ended.output
    trained = msdiff("train", out, "train.steps=2", "--run-dir", tmp_path / "run")
    assert trained.status == 0, trained.output
