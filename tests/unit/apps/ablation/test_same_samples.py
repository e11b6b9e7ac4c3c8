"""Variants of one seed train on the same samples with the same noise, so what differs between them is the method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from msdiff_dist.apps.ablation.config import load_ablation
from msdiff_dist.apps.train.parts import build_feed
from msdiff_dist.apps.train.plan import plan_run
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.data.make.datasets import prepare
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.distributed.groups import make_groups
from msdiff_dist.recipe import Recipe, load_recipe
from msdiff_dist.sweep import overrides_of

FILE = Path(__file__).parents[4] / "recipes/ablations/fashion_mnist_baselines_cpu.yaml"
ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _fed(recipe: Recipe, steps: int) -> list[dict[str, object]]:
    """What the feed of a training gives: keys, images, noise and times of each global batch, by index in it."""
    plan, B = plan_run(recipe, 1), recipe.train.batch_size(1)
    reader = StepLoader(recipe.data, recipe.train.seed, B)
    feed = build_feed(recipe, plan, reader, make_groups(plan.placement.stages_of_rank, 0), ALONE, start_batch=0)
    found: list[dict[str, object]] = []
    for _ in range(steps):
        (micro,) = feed.next_batch()
        place = np.argsort(micro.samples.index_n)
        found.append({
            "keys": [feed.keys_of(micro.batch, range(B))[i] for i in range(B)],
            "images": micro.samples.x_nCHW[place],
            "noise": micro.drawn.noise_nCHW[place],
            "dropped": micro.drawn.dropped_n[place] if micro.drawn.dropped_n is not None else None,
            "times": micro.drawn.t_n[place],
        })  # fmt: skip
    feed.close()
    return found


def test_variants_of_a_seed_train_on_the_same_samples_with_the_same_noise(process_group: None, tmp_path: Path) -> None:
    prepare("digits", tmp_path / "digits", shards=24)
    config, _ = load_ablation(FILE, [])
    recipes = {
        name: load_recipe(
            FILE.parent / config.recipe,
            overrides_of({**config.changes, **changes, "data.shards": str(tmp_path / "digits"), "train.seed": 3}),
        )
        for name, changes in config.variants.items()
    }
    fed = {name: _fed(recipe, 2) for name, recipe in recipes.items()}
    first = fed["unified"]
    assert not torch.equal(first[0]["noise"], first[1]["noise"])  # type: ignore[arg-type]
    for name, batches in fed.items():
        for expected, batch in zip(first, batches, strict=True):
            assert batch["keys"] == expected["keys"], name
            for what in ("images", "noise", "dropped"):
                assert torch.equal(batch[what], expected[what]), (name, what)  # type: ignore[arg-type]
            # Times follow the stages and SpeeD's density, and nothing else.
            same = torch.equal(batch["times"], expected["times"])  # type: ignore[arg-type]
            assert same == (name.startswith("unified") and name != "unified_speed"), name
