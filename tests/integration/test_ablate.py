"""`msdiff ablate` from an ablation file to its table, on tiny models of digits."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.linalg import sqrtm

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.diffusion.sampling import SamplerConfig
from msdiff_dist.evaluation.feature_classifier import load_classifier, save_classifier, train_classifier
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.export.weights import open_weights
from tests.integration.conftest import ROOT, Msdiff

pytestmark = pytest.mark.integration

IMAGES = 30


@pytest.fixture(scope="module")
def sweep(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants and two seeds, five or six steps each."""
    folder = tmp_path_factory.mktemp("sweep")
    data = DataConfig(shards=str(digits), image_size=16, channels=1, num_classes=10)
    save_classifier(train_classifier(data, 50), folder / "classifier.safetensors")
    values = {
        "recipe": str(ROOT / "recipes/quickstart.yaml"),
        "changes": {
            "data.shards": str(digits),
            "model.encoder_channels": 8,
            "model.num_head_channels": 4,
            "model.norm_groups": 4,
            "train.precision": "fp32",
            "train.global_batch_size": 12,
        },
        "variants": {
            "unified": {"model.decoder_channels": [8], "stages.boundaries": [], "stages.sampling": "uniform"},
            "multistage": {"model.decoder_channels": [12, 8, 4]},
        },
        "budget": 2.2e-6,
        "seeds": [3, 5],
        "points": [0.4, 1.0],
        "score": {
            "classifier": str(folder / "classifier.safetensors"),
            "reference": str(digits),
            "pictures": IMAGES,
            "batch_size": 20,
            "sampler": {"name": "ddim", "steps": 3, "clip": True},
        },
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / "sweep.yaml"


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features.T)


def _score_again(run: Path, step: int, seed: int, digits: Path, classifier: Path) -> float:
    """The same score by other means: all images at once, the data by the training loader, scipy's square root."""
    model = load_classifier(classifier)
    generator = ImageGenerator(open_weights(run, step), torch.device("cpu"))
    labels = torch.tensor([i % 10 for i in range(IMAGES)])
    images = generator(range(IMAGES), SamplerConfig(name="ddim", steps=3, clip=True), seed, labels)
    data = DataConfig(shards=str(digits), image_size=16, channels=1, lanes=1, shuffle=0)
    with StepLoader(data, 0, 1618) as loader, torch.no_grad():
        reference, generated = (model.features(x).double().numpy() for x in (next(loader).x_nCHW, images))
    (m, a), (n, b) = _gaussian(generated), _gaussian(reference)
    return float(((m - n) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real))


def _files(folder: Path) -> dict[str, Any]:
    kept = [p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl", ".csv", ".md")]
    return {str(p.relative_to(folder)): p.read_text() for p in kept}


def test_table_of_two_variants_and_two_seeds(msdiff: Msdiff, sweep: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    parts = [msdiff("ablate", sweep, "--out", out, "--part", part, "--parts", 2) for part in (0, 1)]
    assert [p.status for p in parts] == [0, 0], parts
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [row["variant"] for row in rows] == ["unified", "unified", "multistage", "multistage"]
    for row in rows:
        step, scores = int(row["step"]), []
        for seed in (3, 5):
            run = out / row["variant"] / f"seed_{seed}"
            metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            assert float(row["petaflops"]) == pytest.approx(metrics[step - 1]["petaflops"])
            assert float(row[f"score_seed_{seed}"]) == pytest.approx(
                _score_again(run, step, seed, digits, sweep.parent / "classifier.safetensors"), rel=1e-5
            )
            scores.append(float(row[f"score_seed_{seed}"]))
        assert float(row["score_mean"]) == pytest.approx(np.mean(scores))
        assert float(row["score_std"]) == pytest.approx(np.std(scores, ddof=1))
        wanted = 2.2e-6 * (0.4 if row in rows[::2] else 1.0)
        assert abs(float(row["petaflops"]) - wanted) < metrics[0]["petaflops"]
        assert int(row["params"]) == sum(p.numel() for p in _parameters(run))
    assert float(rows[1]["petaflops"]) <= 2.2e-6
    assert (out / "quality.png").stat().st_size > 1000
    table = (out / "results.md").read_text()
    assert f"{float(rows[1]['score_mean']):.2f} ± {float(rows[1]['score_std']):.2f}" in table

    # What is done is not done again. A run that has lost its last checkpoint and scores resumes to the same result.
    before = _files(out)
    logs = {p: p.stat().st_mtime_ns for p in out.rglob("rank_0.log")}
    assert msdiff("ablate", sweep, "--out", out).status == 0
    assert _files(out) == before
    assert {p: p.stat().st_mtime_ns for p in out.rglob("rank_0.log")} == logs
    cut = out / "multistage/seed_5"
    shutil.rmtree(sorted((cut / "checkpoints").iterdir())[-1])
    (cut / "scores.json").unlink()
    assert msdiff("ablate", sweep, "--out", out).status == 0
    again = _files(out)
    lines = before["multistage/seed_5/metrics.jsonl"].splitlines()
    kept = again["multistage/seed_5/metrics.jsonl"].splitlines()
    first = int(rows[2]["step"])
    assert kept[:first] == lines[:first]
    assert len(kept) == len(lines)
    for name in ("results.csv", "multistage/seed_5/scores.json"):
        assert again[name] == before[name]

    # A larger budget moves the points to steps that the runs have passed without keeping a checkpoint.
    longer = msdiff("ablate", sweep, "budget=4e-6", "--out", out)
    assert longer.status == 2
    assert "kept no checkpoint of step" in longer.output


def _parameters(run: Path) -> list[torch.Tensor]:
    weights = open_weights(run)
    return [weights.tensor(name) for name in weights.names()]


MISTAKES = {
    "budget": (["budget=1e-9"], ["budget", "less than one step of unified"]),
    "points outside": (["points=[0.5,1.5]"], ["points", "(0, 1]"]),
    "points too near": (["points=[0.01,0.02,1]"], ["points", "the same step of unified"]),
    "no end": (["points=[0.5]"], ["points", "end with 1"]),
    "seeds": (["seeds=[1,1]"], ["seeds", "twice"]),
    "variant's field": (["variants.wide={model.decoder_chanels: [8]}"], ["variants.wide: model.decoder_chanels"]),
    "variant's recipe": (["variants.wide={recipe: none.yaml}"], ["variants.wide: RECIPE", "no such file"]),
    "steps": (["variants.wide={train.steps: 7}"], ["train.steps", "follows from the budget"]),
    "classifier": (["score.classifier=none.safetensors"], ["classifier", "no such file"]),
    "other shape": (["budget=1", "variants.wide={data.image_size: 32}"], ["data.image_size = 32", "16x16 pixels"]),
    "sampler": (["score.sampler.name=heun"], ["variants.unified: name", "heun"]),
    "field": (["scor.pictures=3"], ["scor", "not a known field"]),
    "part": (["--part", 2, "--parts", 2], ["--part"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, msdiff: Msdiff, sweep: Path, tmp_path: Path) -> None:
    arguments, words = MISTAKES[name]
    ended = msdiff("ablate", sweep, *arguments, "--out", tmp_path / "out")
    assert ended.status == 2, ended.output
    for word in words:
        assert word in ended.output
    assert not (tmp_path / "out").exists()
