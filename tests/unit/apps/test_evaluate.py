"""`msdiff evaluate` on folders of images, and `msdiff compare` of its records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msdiff_dist.apps.evaluation.compare import compare
from msdiff_dist.apps.evaluation.evaluate import EvaluationRequest, evaluate
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.make.pack import pack
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig
from msdiff_dist.errors import ConfigError, DataError, RunFolderError, UserError
from msdiff_dist.evaluation import reference as reference_module
from msdiff_dist.evaluation.feature_spaces import load_feature_space
from msdiff_dist.evaluation.frechet import fit, frechet_distance
from msdiff_dist.evaluation.image_sets import ShardImages
from msdiff_dist.evaluation.sampling_job import SamplingJob
from msdiff_dist.models.song.config import SongConfig
from tests.unit.convert.conftest import make_export

__all__ = ["make_export"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _images(folder: Path, seed: int, count: int = 12, shape: tuple[int, ...] = (16, 16, 3)) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"{i:05d}.png")
    return folder


def _request(subject: Path, **options: Any) -> EvaluationRequest:
    return EvaluationRequest(subject=subject, job=SamplingJob(num=12), **{"metrics": ("fid",), **options})


def _features(folder: Path) -> np.ndarray:
    space = load_feature_space("mobilenet", None, torch.device("cpu"))
    images = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    return space(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))[0].double().numpy()


def test_the_score_is_that_of_the_images(tmp_path: Path) -> None:
    a, b = _images(tmp_path / "a", 0), _images(tmp_path / "b", 1)
    (b / "grid.png").write_bytes(b"is not one of the images")
    (b / "._00000.png").write_bytes(b"nor this")
    found = evaluate(_request(a, reference=str(b), metrics=("fid", "kid")))
    assert found is not None
    for stray in (b / "grid.png", b / "._00000.png"):
        stray.unlink()
    expected = frechet_distance(fit(_features(a)), fit(_features(b)))
    assert found.record["metrics"]["fid"] == pytest.approx(expected, rel=1e-6)
    assert found.record["reference"]["num"] == found.record["num"] == 12
    assert any("biased" in note for note in found.notes)
    json.dumps(found.record)


def test_features_of_the_reference_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = _images(tmp_path / "a", 0), _images(tmp_path / "b", 1)
    first = evaluate(_request(a, reference=str(b)))
    computed: list[str] = []
    inner = reference_module.features_of
    monkeypatch.setattr(reference_module, "features_of", lambda *args: computed.append(args[2]) or inner(*args))
    second = evaluate(_request(a, reference=str(b)))
    assert computed == []
    assert first is not None
    assert second is not None
    assert first.record["metrics"] == second.record["metrics"]
    Image.new("RGB", (16, 16)).save(b / "00003.png")  # other images: other features
    third = evaluate(_request(a, reference=str(b)))
    assert computed == ["--reference"]
    assert third is not None
    assert third.record["metrics"] != first.record["metrics"]


def test_statistics_and_batches_in_npz_files(tmp_path: Path) -> None:
    a, b = _images(tmp_path / "a", 0), _images(tmp_path / "b", 1)
    stats, batch = tmp_path / "stats.npz", tmp_path / "batch.npz"
    np.savez(batch, arr_0=np.stack([np.asarray(Image.open(path)) for path in sorted(b.glob("*.png"))]))
    direct = evaluate(_request(a, reference=str(b), statistics=stats))
    assert direct is not None
    with np.load(stats) as held:
        assert held["mu"].shape == (1280,)
        assert held["sigma"].shape == (1280, 1280)
    for reference in (stats, batch):
        found = evaluate(_request(a, reference=str(reference)))
        assert found is not None
        assert found.record["metrics"]["fid"] == pytest.approx(direct.record["metrics"]["fid"], rel=1e-6)
    with pytest.raises(DataError, match="fid"):  # no features, so no other metric
        evaluate(_request(a, reference=str(stats), metrics=("kid",)))
    foreign = tmp_path / "edm.npz"
    np.savez(foreign, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(DataError, match="inception"):
        evaluate(_request(a, reference=str(foreign)))
    with pytest.raises(DataError, match="mobilenet"):
        evaluate(_request(a, reference=str(stats), features="efficientnet"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shape": (24, 24, 3)}, "one shape"),
        ({"shape": (16, 16)}, "one shape"),
        ({"count": 1}, "two"),
    ],
)
def test_references_that_do_not_fit(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    a, b = _images(tmp_path / "a", 0), _images(tmp_path / "b", 1, **change)
    with pytest.raises(UserError, match=problem):
        evaluate(_request(a, reference=str(b)))


def test_subjects_that_cannot_be_evaluated(tmp_path: Path) -> None:
    a = _images(tmp_path / "a", 0)
    (tmp_path / "empty").mkdir()
    for request, problem in (
        (_request(tmp_path / "none", reference=str(a)), "is no folder"),
        (_request(tmp_path / "empty", reference=str(a)), "holds no images"),
        (_request(a), "--reference"),
    ):
        with pytest.raises(UserError, match=problem):
            evaluate(request)
    (a / "00004.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match="00004"):
        evaluate(_request(a, reference=str(a)))
    with pytest.raises(ConfigError, match="fid"):
        _request(a, metrics=("fad",))


def _record(value: float, half: float, digest: str = "d", **more: Any) -> str:
    record = {
        "metrics": {"fid": value}, "intervals": {"fid": [value - half, value + half]}, "step": 5, "num": 100,
        "features": {"name": "mobilenet", "digest": digest}, "reference": {"name": "r", "key": "k"}, **more,
    }  # fmt: skip
    return json.dumps(record) + "\n"


def test_a_folder_for_samples_that_holds_something_else(make_export: Any, tmp_path: Path) -> None:
    model = SongConfig(
        encoder_channels=16, channel_mult=(1,), num_res_blocks=1, attention_downsamples=(), norm_groups=8,
        family="ddpmpp", decoder_channels=(16,),
    )  # fmt: skip
    export = make_export(model, diffusion=DiffusionConfig(process="edm"), stages=StagesConfig())
    request = _request(export, samples=_images(tmp_path / "other", 0), reference=str(_images(tmp_path / "b", 1)))
    with pytest.raises(RunFolderError, match=r"--samples = .*other': holds something else\. Name a new folder"):
        evaluate(request)


def test_compare_marks_the_best_and_what_may_be_noise(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in "abc"]
    for run, value in zip(runs, (10.0, 10.8, 12.0), strict=True):
        run.mkdir()
        (run / "evaluations.jsonl").write_text(_record(99, 1) + _record(value, 0.7) + _record(1, 1, "other", num=7))
    tables = compare(runs)
    assert [len(table.rows) for table in tables] == [3, 3]  # never across identities
    marks = [values["fid"].mark for _, values in tables[0].rows]
    assert marks == ["best", "noise", ""]
    assert [values["fid"].value for _, values in tables[0].rows] == [10.0, 10.8, 12.0]  # the newest of each
    (runs[0] / "evaluations.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="jsonl:1"):
        compare(runs)
    with pytest.raises(DataError, match="msdiff evaluate"):
        compare([tmp_path])


def test_shards_of_other_sizes_are_read_as_the_run_reads_them(tmp_path: Path) -> None:
    """A run on images that it scales, as `msdiff init --data` writes, has its own data for a reference."""
    pack(_images(tmp_path / "images", 1, shape=(20, 30, 3)), tmp_path / "shards")
    config = DataConfig(shards=str(tmp_path / "shards"), image_size=16, resize="cover", num_classes=2)
    images = ShardImages(config)
    assert sum(len(batch) for batch in images.batches()) == 12
    assert images.key == ShardImages(config).key
    assert images.key != ShardImages(replace(config, resize="pad")).key
