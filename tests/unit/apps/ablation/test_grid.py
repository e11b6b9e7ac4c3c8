"""Variants that try values of fields: their names and changes, and the places of their fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from msdiff_dist.apps.ablation.config import load_ablation
from msdiff_dist.errors import ConfigError

FILE = """\
recipe: quickstart.yaml
variants:
  unified: {stages.boundaries: []}
  multistage: {}
grid:
  unified:
    optimizer.lr: [0.001, 0.002]
    ema.decay: [0.9, 0.99]
budget: 1.0
score: {}
"""


def _file(folder: Path, text: str) -> Path:
    path = folder / "ablation.yaml"
    path.write_text(text)
    return path


def test_every_combination_is_a_variant_after_the_one_that_it_changes(tmp_path: Path) -> None:
    config, places = load_ablation(_file(tmp_path, FILE), [])
    assert config.variants == {
        "unified": {"stages.boundaries": []},
        "unified_lr=0.001_decay=0.9": {"stages.boundaries": [], "optimizer.lr": 0.001, "ema.decay": 0.9},
        "unified_lr=0.001_decay=0.99": {"stages.boundaries": [], "optimizer.lr": 0.001, "ema.decay": 0.99},
        "unified_lr=0.002_decay=0.9": {"stages.boundaries": [], "optimizer.lr": 0.002, "ema.decay": 0.9},
        "unified_lr=0.002_decay=0.99": {"stages.boundaries": [], "optimizer.lr": 0.002, "ema.decay": 0.99},
        "multistage": {},
    }
    further = "variants.unified_lr=0.002_decay=0.9"
    assert places.of(f"{further}.optimizer.lr").endswith("ablation.yaml:7")
    assert places.of(f"{further}.ema.decay").endswith("ablation.yaml:8")
    assert places.of(f"{further}.stages.boundaries").endswith("ablation.yaml:3")


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("  unified:\n    optimizer", "  unify:\n    optimizer", "grid"),
        ("[0.001, 0.002]", "[]", "grid.unified.optimizer.lr"),
        ("optimizer.lr: [0.001, 0.002]", "train.seed: [1, 2]", "train.seed"),
    ],
)
def test_mistakes_in_a_grid(old: str, new: str, field: str, tmp_path: Path) -> None:
    assert FILE.count(old) == 1
    with pytest.raises(ConfigError) as refused:
        load_ablation(_file(tmp_path, FILE.replace(old, new)), [])
    assert refused.value.field == field
