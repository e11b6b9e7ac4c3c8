"""Every ablation file of the recipes loads and plans, with one budget for all its variants; mistakes are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from msdiff_dist.apps.ablation.config import load_ablation
from msdiff_dist.apps.ablation.plan import plan_ablation
from msdiff_dist.data.make.datasets import prepare
from msdiff_dist.errors import UserError
from msdiff_dist.evaluation.feature_classifier import ClassifierInfo, FeatureClassifier, save_classifier
from msdiff_dist.recipe import load_recipe

RECIPES = Path(__file__).parents[4] / "recipes"
ABLATIONS = sorted((RECIPES / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_ablation_plans(path: Path, tmp_path: Path) -> None:
    whole, _ = load_ablation(path, [])
    assert whole.score.metrics[0] == "loss"
    base = load_recipe(path.parent / whole.recipe)
    assert base.validation is not None or "validation.fraction" in whole.changes
    # Random numbers in the place of images that are not here: there is nothing to hold out.
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "0.png")
    given = [f"score.reference={tmp_path / 'images'}", "score.reference_num=null", "score.metrics=[fid]"]
    given += ["score.features=[mobilenet]", "seeds=[0]"]
    config, places = load_ablation(path, given)
    size = config.changes.get("data.image_size", base.data.image_size)
    shape = config.changes.get("data.latent_shape", base.data.latent_shape) or [base.data.channels, size, size]
    for field in [name for name in config.changes if name.startswith("validation.")]:
        del config.changes[field]
    config.changes["validation"] = None
    config.changes.update({"data.kind": "synthetic", "data.shards": [], "data.image_size": None, "data.flip": False})
    config.changes["data.latent_shape"] = list(shape)
    config.changes["model.num_res_blocks"] = 1  # as deep as they are, they take long to count
    plan = plan_ablation(config, places, path.parent, tmp_path / "out", 1)
    assert [t.variant for t in plan.trials] == list(config.variants)
    for trial in plan.trials:
        assert 0 <= config.budget - trial.petaflops[-1] < 1.2 * trial.step_petaflops  # steps may differ
        assert trial.recipe.train.steps == trial.steps[-1] > 1000
        assert trial.recipe.checkpoint.at == trial.steps
        assert [(s.prefix, s.metrics) for s in trial.sets] == [("mobilenet/", ("fid",))]
        assert trial.unscored() == list(trial.steps)
        # Where no step begins anew, scores do not depend on whether it may, and keep their name.
        near_the_data = 100 in trial.recipe.stages.boundaries
        assert ("restart" in trial.sets[0].about["sampler"]) == near_the_data
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ablation file of one variant that trains on digits."""
    folder = tmp_path_factory.mktemp("sweep")
    prepare("digits", folder / "digits", shards=4)
    save_classifier(FeatureClassifier(ClassifierInfo(image_shape=(1, 16, 16), classes=10)), folder / "c.safetensors")
    changes = {
        "data.shards": str(folder / "digits"), "model.encoder_channels": 8, "model.num_head_channels": 4,
        "model.norm_groups": 4, "model.decoder_channels": [8], "stages.boundaries": [], "stages.sampling": "uniform",
        "validation.fraction": 0.1, "validation.num": 64,
    }  # fmt: skip
    score = {"metrics": ["loss", "fid"], "features": [str(folder / "c.safetensors")], "num": 20}
    values = {
        "recipe": str(RECIPES / "quickstart.yaml"), "changes": changes, "variants": {"baseline": {}}, "budget": 1.0,
        "score": score,
    }  # fmt: skip
    (folder / "sweep.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / "sweep.yaml"


def _plan(sweep: Path, *overrides: str) -> None:
    config, places = load_ablation(sweep, list(overrides))
    plan_ablation(config, places, sweep.parent, sweep.parent / "out", 1)


MISTAKES = {
    "levels": ("levels=[0.2]", "levels.*outside the points"),
    "metric": ("score.metrics=[fad]", "score.metrics.*fid"),
    "metric of prompts": ("score.metrics=[clip]", "score.metrics.*prompts"),
    "classes": ("score.metrics=[is]", "score.metrics.*needs classes"),
    "weights": ("score.feature_weights={dinov2: x}", "score.feature_weights.*not among the features"),
    "features": ("score.features=[mobilenett]", "score.features.*mobilenet"),
    "two of a name": ("score.features=[{c}, {c}]", "score.features.*twice"),
    "reference": ("score.reference=none", "shards not found: none"),
    "statistics": ("score.reference=none.npz", "score.reference.*cannot be read"),
    "nothing held out": ("changes={data.shards: {digits}, validation: null}", "score.metrics.*holds none out"),
    "objective": (
        "variants.v={diffusion.discrete.prediction_type: v_prediction}",
        "variants.v: diffusion.*held-out losses do not compare",
    ),
    "noise": ("variants.v={diffusion.discrete.beta_end: 0.03}", "variants.v: diffusion.*do not compare"),
    "held-out samples": ("variants.v={validation.num: 65}", "variants.v: validation.num.*other samples"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, sweep: Path) -> None:
    override, problem = MISTAKES[name]
    override = override.replace("{c}", str(sweep.parent / "c.safetensors"))
    with pytest.raises(UserError, match=problem):
        _plan(sweep, override.replace("{digits}", str(sweep.parent / "digits")))


def test_what_does_not_touch_held_out_losses_may_differ(sweep: Path) -> None:
    """Stages, weights of times, the error that is trained on and augmentation; without `loss`, the process too."""
    stages = "model.decoder_channels: [8, 8], stages.boundaries: [500], stages.sampling: equal"
    weights = "diffusion.discrete.min_snr_gamma: 5.0, train.loss: l1, data.flip: true"
    _plan(sweep, f"variants.v={{{stages}, {weights}}}")
    _plan(sweep, "variants.v={diffusion.discrete.prediction_type: v_prediction}", "score.metrics=[fid]")
