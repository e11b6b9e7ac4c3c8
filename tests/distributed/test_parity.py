"""Stage-parallel training equals one process without DeepSpeed, whatever the layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from msdiff_dist.apps.train.local import run_local
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.recipe import load_recipe, recipe_mapping
from tests.distributed.reference import ReferenceRun, train_reference

pytestmark = pytest.mark.distributed

DEBUG = Path(__file__).parents[2] / "recipes/debug.yaml"
STEPS = 4
TOLERANCE = 1e-5
OPTIMIZERS = {
    "adamw": ["optimizer.eps=1e-6", "optimizer.weight_decay=0.01"],
    "sgd": ["optimizer.name=sgd", "optimizer.lr=0.05", "optimizer.momentum=0.9"],
}
LAYOUTS = {
    "auto": (3, "auto"),
    "one": (1, "auto"),
    "disjoint": (4, "[[0],[0],[1],[2]]"),
    "shared": (3, "[[0],[0,1],[1,2]]"),
    "crossed": (3, "[[0,1,2],[0,2],[0,1,2]]"),
    "two": (2, "auto"),
}
TIMES = "diffusion.times={suppressed_from: 600, importance_weights: true}"
OBJECTIVES = "stages.objectives=[{prediction_type: v_prediction}, {}, {prediction_type: sample, min_snr_gamma: 5}]"
CASES = [
    # layout, optimizer, zero_shared, zero_decoders, accumulation, more overrides
    ("two", "adamw", 2, 2, 2, []),
    ("auto", "sgd", 3, 1, 1, []),
    ("disjoint", "adamw", 1, 1, 2, []),
    ("disjoint", "adamw", 3, 1, 1, ["data.workers=2", OBJECTIVES]),
    ("shared", "adamw", 2, 2, 1, []),
    ("shared", "sgd", 1, 1, 2, ["stages.sampling=uniform", TIMES]),
    ("shared", "adamw", 3, 1, 2, ["stages.sampling=[3,2,1]"]),
    ("crossed", "adamw", 2, 2, 2, [OBJECTIVES]),
    ("shared", "adamw", 1, 2, 1, ["model.share_encoder=false"]),
    ("two", "adamw", 1, 1, 1, ["stages.boundaries=[]", "model.decoder_channels=[24]", "diffusion.times={}"]),
    ("one", "adamw", 1, 1, 2, ["stages.batch=one_stage", "stages.sampling=[3,1,2]", "stages.importance_weights=true"]),
    ("auto", "adamw", 3, 2, 2, ["stages.batch=one_stage", "ema.power.snapshot_every=100"]),
    ("disjoint", "sgd", 2, 2, 1, ["stages.batch=one_stage", "stages.sampling=uniform"]),
    ("shared", "adamw", 1, 1, 2, ["stages.batch=one_stage", "ema.halflife_images=100", "ema.decay=null"]),
    ("two", "adamw", 1, 1, 1, ["stages.sampling=[1,1,3]", "stages.importance_weights=true"]),
    ("one", "adamw", 1, 1, 2, ["stages.min_samples_per_step=13", "stages.sampling=[3,1,2]"]),
    ("shared", "adamw", 3, 2, 1, ["stages.min_samples_per_step=9", "stages.sampling=[3,1,2]"]),
    ("disjoint", "adamw", 1, 1, 2, ["stages.min_samples_per_step=16", "ema.power.snapshot_every=100"]),
    ("auto", "sgd", 2, 2, 2, ["stages.min_samples_per_step=30", "stages.batch=one_stage"]),
]
SMALL = [
    f"train.steps={STEPS}", "train.global_batch_size=24", "train.precision=fp32", "optimizer.grad_clip=0.3",
    "checkpoint.every=0",
]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "optimizer", "zero_shared", "zero_decoders", "accumulation", "more"),
    CASES,
    ids=lambda v: "+".join(v) if isinstance(v, list) else str(v),
)
def test_same_training_as_one_process(
    layout: str,
    optimizer: str,
    zero_shared: int,
    zero_decoders: int,
    accumulation: int,
    more: list[str],
    tmp_path: Path,
) -> None:
    world, placement = LAYOUTS[layout]
    overrides = [
        *SMALL,
        *OPTIMIZERS[optimizer],
        *more,
        f"parallel.placement={placement}",
        f"parallel.zero_shared={zero_shared}",
        f"parallel.zero_decoders={zero_decoders}",
        f"train.gradient_accumulation_steps={accumulation}",
    ]
    recipe = load_recipe(DEBUG, overrides)
    assert run_local(recipe_mapping(recipe), tmp_path / "run", world) == "finished"
    check_equal(train_reference(recipe, STEPS), tmp_path / "run")


def check_equal(reference: ReferenceRun, run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["loss"] for m in lines] == pytest.approx(reference.losses, rel=TOLERANCE)
    assert [m["grad_norm"] for m in lines] == pytest.approx(reference.grad_norms, rel=TOLERANCE)
    assert max(reference.grad_norms) > 0.3, "clipping is exercised"
    reader = CheckpointReader(run / f"checkpoints/step_{STEPS:08d}")
    assert sorted(reader.names()) == sorted(reference.state)
    for name, expected in reference.state.items():
        torch.testing.assert_close(reader.tensor("param", name), expected, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(reader.tensor("ema", name), reference.ema[name], rtol=0, atol=TOLERANCE)
