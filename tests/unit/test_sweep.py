"""Sweep files."""

from __future__ import annotations

from pathlib import Path

import pytest

from msdiff_dist.errors import ConfigError
from msdiff_dist.sweep import SweepConfig, load_sweep, overrides_of, run_names


def test_every_combination_then_the_single_runs() -> None:
    sweep = SweepConfig(
        recipe="r.yaml", grid={"optimizer.lr": [0.1, 0.2], "train.seed": [0, 1]}, runs=[{"train.steps": 3}]
    )
    assert sweep.changes == [
        {"optimizer.lr": 0.1, "train.seed": 0},
        {"optimizer.lr": 0.1, "train.seed": 1},
        {"optimizer.lr": 0.2, "train.seed": 0},
        {"optimizer.lr": 0.2, "train.seed": 1},
        {"train.steps": 3},
    ]
    assert run_names(sweep.changes)[3] == "003_lr=0.2_seed=1"


@pytest.mark.parametrize(
    "change", [{"a.b": 0.0003}, {"a.b": [442, 631]}, {"a.b": "x y"}, {"a.b": None}, {"a.b": True}, {"a.b": "1"}]
)
def test_changes_survive_the_way_through_the_command_line(change: dict[str, object]) -> None:
    from omegaconf import OmegaConf

    (override,) = overrides_of(change)
    read = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    assert read == {"a": {"b": change["a.b"]}}


def test_a_recipe_is_no_sweep_and_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("name: faces\ntrain: {steps: 3}\n")
    assert load_sweep(path) is None
    path.write_text("recipe: r.yaml\n")
    with pytest.raises(ConfigError, match="no runs"):
        load_sweep(path)
    path.write_text("recipe: r.yaml\ngird: {a: [1]}\n")
    with pytest.raises(ConfigError, match="Did you mean 'grid'"):
        load_sweep(path)
    path.write_text("recipe: r.yaml\ngrid: {a: []}\n")
    with pytest.raises(ConfigError, match=r"grid\.a"):
        load_sweep(path)
