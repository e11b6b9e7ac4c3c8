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


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
            "validation.fraction": 0.1,
            "validation.num": 64,
            "validation.every": 1,
        },
        "variants": {
            "unified": {"model.decoder_channels": [8], "stages.boundaries": [], "stages.sampling": "uniform"},
            "multistage": {"model.decoder_channels": [12, 8, 4]},
        },
        "budget": 2.2e-6,
        "seeds": [3, 5],
        "points": [0.4, 1.0],
        "score": {
            "metrics": ["loss", "fid"],
            "features": [str(folder / "classifier.safetensors")],
            "num": IMAGES,
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
    both = [row["score"] for row in rows]
    assert both == ["loss", "loss", "classifier/fid", "classifier/fid"] * 2
    assert [row["variant"] for row in rows] == ["unified"] * 4 + ["multistage"] * 4
    for number, row in enumerate(rows):
        step, scores = int(row["step"]), []
        for seed in (3, 5):
            run = out / row["variant"] / f"seed_{seed}"
            metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            assert float(row["petaflops"]) == pytest.approx(metrics[step - 1]["petaflops"])
            if row["score"] == "loss":
                expected = metrics[step - 1]["validation"]["unweighted"]  # as training computed it
            else:
                expected = _score_again(run, step, seed, digits, sweep.parent / "classifier.safetensors")
            assert float(row[f"seed_{seed}"]) == pytest.approx(expected, rel=1e-5)
            scores.append(float(row[f"seed_{seed}"]))
        assert float(row["mean"]) == pytest.approx(np.mean(scores))
        assert float(row["std"]) == pytest.approx(np.std(scores, ddof=1))
        wanted = 2.2e-6 * (1.0 if number % 2 else 0.4)
        assert abs(float(row["petaflops"]) - wanted) < metrics[0]["petaflops"]
        assert int(row["params"]) == sum(p.numel() for p in _parameters(run))
    assert float(rows[1]["petaflops"]) <= 2.2e-6
    assert (out / "quality.png").stat().st_size > 1000
    assert "<h1>out</h1>" in (out / "results.html").read_text()
    table = (out / "results.md").read_text()
    assert f"{float(rows[3]['mean']):.4g} ± {float(rows[3]['std']):.2g}" in table
    _check_json(json.loads((out / "results.json").read_text(), parse_constant=pytest.fail), rows)

    # What is done is not done again. A run that has lost its last checkpoint and scores resumes to the same result.
    before = _files(out)
    logs = {p: p.stat().st_mtime_ns for p in out.rglob("rank_0.log")}
    cut = out / "multistage/seed_5"
    shutil.rmtree(sorted((cut / "checkpoints").iterdir())[-1])
    (cut / "scores.json").unlink()
    assert msdiff("ablate", sweep, "--out", out).status == 0
    again = _files(out)
    lines = before["multistage/seed_5/metrics.jsonl"].splitlines()
    kept = again["multistage/seed_5/metrics.jsonl"].splitlines()
    first = int(rows[4]["step"])
    assert kept[:first] == lines[:first]
    assert len(kept) == len(lines)
    unchanged = [name for name in before if not name.startswith("multistage/seed_5")]
    assert {name: again[name] for name in unchanged} == {name: before[name] for name in unchanged}
    assert again["multistage/seed_5/scores.json"] == before["multistage/seed_5/scores.json"]

    # A new metric is taken of the checkpoints that are there; nothing is trained, and no other score is taken again.
    logs = {p: p.stat().st_mtime_ns for p in out.rglob("rank_0.log")}
    assert msdiff("ablate", sweep, "score.metrics=[fid,kid]", "--out", out).status == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("rank_0.log")} == logs
    found = json.loads((out / "results.json").read_text())
    assert list(found["scores"]) == ["classifier/fid", "classifier/kid"]
    old, new = (json.loads(files["unified/seed_3/scores.json"])["sets"] for files in (before, _files(out)))
    assert old.keys() == new.keys()
    for digest, scores in new.items():
        assert {step: {m: v for m, v in of.items() if m != "kid"} for step, of in scores["scores"].items()} == (
            old[digest]["scores"]
        )

    # A larger budget moves the points to steps that the runs have passed without keeping a checkpoint.
    longer = msdiff("ablate", sweep, "budget=4e-6", "--out", out)
    assert longer.status == 2
    assert "kept no checkpoint of step" in longer.output


def _check_json(found: dict[str, Any], rows: list[dict[str, str]]) -> None:
    """The schema of docs/guides/ablations.md, with the numbers of the CSV file."""
    assert (found["format"], found["baseline"], found["points"]) == (1, "unified", [0.4, 1.0])
    assert {name: about["higher_is_better"] for name, about in found["scores"].items()} == {
        "loss": False, "classifier/fid": False,
    }  # fmt: skip
    assert found["scores"]["loss"]["about"]["num"] == 64
    assert found["scores"]["classifier/fid"]["about"]["num"] == IMAGES
    assert list(found["variants"]) == ["unified", "multistage"]
    for row, point in zip(rows, [0, 1] * 4, strict=True):
        variant = found["variants"][row["variant"]]
        assert variant["params"] == int(row["params"])
        assert variant["gmacs"] == float(row["gmacs"])
        assert variant["changes"]["model.decoder_channels"][0] in (8, 12)
        for seed in ("3", "5"):
            curve = variant["seeds"][seed]
            assert curve["steps"][point] == int(row["step"])
            assert curve["petaflops"][point] == pytest.approx(float(row["petaflops"]))
            assert curve["scores"][row["score"]][point] == float(row[f"seed_{seed}"])
        scores = variant["scores"][row["score"]]
        assert scores["mean"][point] == float(row["mean"])
        assert scores["last"] == scores["mean"][1]
        assert scores["best"] == min(scores["mean"])
    assert found["variants"]["unified"]["scores"]["loss"]["levels"] == []
    for at in found["variants"]["multistage"]["scores"]["loss"]["levels"]:
        assert at.keys() == {
            "level", "score", "baseline_petaflops", "petaflops", "ratio", "above", "below", "low", "high",
            "resamples", "not_reached", "seeds",
        }  # fmt: skip
        assert (at["seeds"], at["resamples"]) == ([3, 5], 2**2)
        assert [at["ratio"], at["above"], at["below"]].count(None) == 2


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
    "baselines": (["baselines=[none]"], ["baselines = 'none'", "is no variant", "multistage"]),
    "first baseline": (["baselines=[unified]"], ["baselines = 'unified'", "is the first variant"]),
    "steps": (["variants.wide={train.steps: 7}"], ["train.steps", "follows from the budget"]),
    "classifier": (["score.features=[none.safetensors]"], ["classifier", "no such file"]),
    "other shape": (["budget=1", "variants.wide={data.image_size: 32}"], ["data.image_size = 32", "16x16 pixels"]),
    "sampler": (["score.sampler.name=heun"], ["variants.unified: name", "heun"]),
    "field": (["scor.num=3"], ["scor", "not a known field"]),
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
