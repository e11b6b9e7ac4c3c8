"""torch-fidelity's own metrics in our feature spaces are those of `msdiff evaluate`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image

from msdiff_dist.apps.evaluation.evaluate import EvaluationRequest, evaluate
from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation import fidelity
from msdiff_dist.evaluation.feature_classifier import ClassifierInfo, FeatureClassifier, save_classifier
from msdiff_dist.evaluation.sampling_job import SamplingJob

NUM = 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, most in (("a", 256), ("b", 200)):
        (root / name).mkdir()
        for i in range(NUM):
            Image.fromarray(rng.integers(0, most, (16, 16, 3), np.uint8)).save(root / name / f"{i:02d}.png")
    return root / "a", root / "b"


@pytest.mark.parametrize("space", ["mobilenet", "file"])
def test_scores_of_two_folders(
    space: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if space == "file":
        torch.manual_seed(0)
        space = str(tmp_path / "net.safetensors")
        save_classifier(FeatureClassifier(ClassifierInfo(image_shape=(3, 16, 16), classes=4)), Path(space))
        fidelity.register("registered-file", space)
    a, b = folders
    theirs = torch_fidelity.calculate_metrics(
        input1=str(a), input2=str(b), fid=True, kid=True, kid_subset_size=NUM, kid_subsets=1, cuda=False, cache=False,
        feature_extractor="msdiff-mobilenet" if space == "mobilenet" else "registered-file", verbose=False,
        batch_size=16, save_cpu_ram=True,
    )  # fmt: skip
    request = EvaluationRequest(
        subject=a, job=SamplingJob(num=NUM), metrics=("fid", "kid"), features=space, reference=str(b)
    )
    ours = evaluate(request)
    assert ours is not None
    assert ours.record["metrics"]["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert ours.record["metrics"]["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert ours.record["metrics"]["fid"] > 1e-3


def test_weights_that_are_missing_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.pth"):
        torch_fidelity.calculate_metrics(
            input1=str(folders[0]), input2=str(folders[1]), fid=True, cuda=False, cache=False, verbose=False,
            feature_extractor="msdiff-dinov2", feature_extractor_weights_path=str(tmp_path / "none.pth"),
        )  # fmt: skip
