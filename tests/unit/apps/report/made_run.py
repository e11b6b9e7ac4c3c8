"""Run folders as training leaves them, made without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

from msdiff_dist.recipe import load_recipe, recipe_mapping

STEPS, BATCH = 12, 72


def metrics(step: int) -> dict[str, Any]:
    """A line of metrics.jsonl; every fourth has a held-out loss."""
    line: dict[str, Any] = {
        "step": step, "loss": 1 / step, "loss_per_stage": [2 / step, 1 / step, 0.5 / step], "grad_norm": 0.5,
        "lr": 1e-3, "images_seen": step * BATCH, "images_per_second": 100.0,
        "seconds": {"data": 0.1, "routing": 0.0, "compute": 0.5, "optimizer": 0.2, "checkpoint": 0.0},
        "balance": 0.9, "petaflops": step * 1e-4, "damaged": 0,
    }  # fmt: skip
    if step % 4 == 0:
        loss = {"loss": 2 / step, "loss_per_stage": [1.0, 0.5, 0.25], "loss_per_bin": [0.3, 0.2, 0.1]}
        line["validation"] = {**loss, "unweighted": 0.5, "weights": "ema", "raw": {**loss, "loss": 3 / step}}
    return line


EVALUATION = {
    "time": "2026-01-02T03:04:05Z", "subject": "run", "recipe": "quickstart", "step": STEPS, "weights": "ema",
    "metrics": {"fid": 12.5}, "intervals": {"fid": [11.25, 13.75]}, "features": {"name": "mobilenet", "digest": "0"},
    "num": 300, "notes": ["fid of 300 images says little"],
}  # fmt: skip


def make_run(folder: Path, *overrides: str, world_size: int = 4, steps: int = STEPS) -> Path:
    """A run of the recipe quickstart on `world_size` ranks."""
    recipe = recipe_mapping(
        load_recipe(Path(__file__).parents[4] / "recipes/quickstart.yaml", ["preview.every=0", *overrides])
    )
    checkpoint = folder / "checkpoints" / f"step_{steps:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text(json.dumps({"step": steps, "world_size": world_size}))
    (folder / "recipe.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(recipe)))
    lines = [json.dumps(metrics(step)) + "\n" for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "evaluations.jsonl").write_text(json.dumps(EVALUATION) + "\n")
    (folder / "samples").mkdir()
    for step in (4, 8, 12):
        Image.new("RGB", (40, 30), (20 * step, 0, 0)).save(folder / "samples" / f"step_{step:08d}.png")
    change = {"step": 6, "field": "optimizer.lr", "old": 0.002, "new": 0.001, "time": 0.0}
    (folder / "recipe_changes.jsonl").write_text(json.dumps(change) + "\n")
    return folder
