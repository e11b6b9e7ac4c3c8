"""A command reads the index and the manifest of a data set once, however many ranks, runs and node numbers it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from msdiff_dist.data.index import find_shards
from msdiff_dist.launch.cluster import ClusterConfig
from msdiff_dist.launch.launcher import Run, check_runs
from msdiff_dist.recipe import load_recipe
from tests.integration.conftest import ROOT, Msdiff
from tests.unit.data.http_server import Behaviour, http_server

pytestmark = pytest.mark.integration


@pytest.fixture
def served(digits: Path) -> Iterator[tuple[str, Behaviour]]:
    with http_server(digits) as (url, behaviour):
        yield url, behaviour


def reads(behaviour: Behaviour) -> Counter[str]:
    return Counter(path for path, _ in behaviour.requests if path.endswith(".json"))


def test_listing_a_folder_and_counting_its_samples(served: tuple[str, Behaviour]) -> None:
    url, behaviour = served
    assert sum(shard.num_samples for shard in find_shards([f"{url}0000{{0..3}}.tar", f"{url}00004.tar"])) > 0
    assert reads(behaviour) == {"/index.json": 1}
    assert len(find_shards(url)) == 12
    assert reads(behaviour) == {"/index.json": 2}


def test_launching_several_runs_on_one_to_four_nodes(served: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = served
    fields = [f"data.shards={url}", "data.kind=latent", "data.latent_shape=[1,16,16]", "data.image_size=null"]
    fields += ["data.lanes=12", "data.max_bad=1"]  # the shards hold images, so their first sample is no latent
    recipes = [load_recipe(ROOT / "recipes/quickstart.yaml", [*fields, f"train.seed={seed}"]) for seed in range(3)]
    runs = [Run(recipe, tmp_path / str(recipe.train.seed)) for recipe in recipes]
    check_runs(runs, ClusterConfig(shared="/", nodes="1-4", gpus_per_node=1))
    assert reads(behaviour) == {"/index.json": 1, "/manifest.json": 1}


def test_training(msdiff: Msdiff, served: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = served
    small = ["model.encoder_channels=16", "model.decoder_channels=[24,16,8]", "train.steps=2", "preview.every=0"]
    done = msdiff(
        "train", "recipes/quickstart.yaml", f"data.shards={url}", *small, "--nproc", 2, "--run-dir", tmp_path / "run"
    )
    assert done.status == 0, done.output
    assert reads(behaviour) == {"/index.json": 1}
