"""Every ablation file of the recipes loads and plans, with one budget for all its variants."""

from __future__ import annotations

from pathlib import Path

import pytest

from msdiff_dist.apps.ablation.run import load_ablation, plan_ablation
from msdiff_dist.evaluation.feature_classifier import ClassifierInfo, FeatureClassifier, save_classifier
from msdiff_dist.recipe import load_recipe

ABLATIONS = sorted((Path(__file__).parents[4] / "recipes/ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_ablation_plans(path: Path, tmp_path: Path) -> None:
    classifier = tmp_path / "classifier.safetensors"
    config, places = load_ablation(path, [f"score.classifier={classifier}", "seeds=[0]"])
    data = load_recipe(path.parent / config.recipe).data
    size = config.changes.get("data.image_size", data.image_size)
    shape = (data.channels, size, size)
    save_classifier(FeatureClassifier(ClassifierInfo(image_shape=shape, classes=10)), classifier)
    config.changes.update({"data.kind": "synthetic", "data.shards": [], "data.image_size": None, "data.flip": False})
    config.changes["data.latent_shape"] = list(shape)  # random numbers in the place of images that are not here
    config.changes["model.num_res_blocks"] = 1  # as deep as they are, they take long to count
    trials = plan_ablation(config, places, path.parent, tmp_path / "out", 1)
    assert [t.variant for t in trials] == list(config.variants)
    for trial in trials:
        assert 0 <= config.budget - trial.step_petaflops * trial.steps[-1] < trial.step_petaflops
        assert trial.recipe.train.steps == trial.steps[-1] > 1000
        assert trial.recipe.checkpoint.at == trial.steps
    assert not (tmp_path / "out").exists()
