"""`msdiff interval-report`, the sampler's budget and end, and gradient clustering, on tiny models of digits."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.make.images import read_images
from msdiff_dist.diffusion.sampling import Condition, SamplerConfig, sample
from msdiff_dist.evaluation.feature_classifier import load_classifier, save_classifier, train_classifier
from msdiff_dist.evaluation.frechet import fit, frechet_distance
from msdiff_dist.evaluation.generate import ImageGenerator, SplicedGenerator
from msdiff_dist.export.weights import open_weights
from msdiff_dist.models.multistage_unet import MultistageUNet, build_parts
from tests.integration.conftest import Msdiff

pytestmark = pytest.mark.integration

SAMPLER = SamplerConfig(name="ddim", steps=12)
LABELS = torch.arange(6)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs `stages` (three), `unified` and `vp`, two steps each, and a classifier."""
    from msdiff_dist.apps.train.local import run_local
    from msdiff_dist.recipe import load_recipe, recipe_mapping

    folder = tmp_path_factory.mktemp("runs")
    small = [f"data.shards={digits}", "model.encoder_channels=8", "model.num_head_channels=4", "model.norm_groups=4",
             "train.precision=fp32", "train.global_batch_size=12", "train.steps=2", "preview.every=0"]  # fmt: skip
    one = ["model.decoder_channels=[8]", "stages.boundaries=[]", "stages.sampling=uniform"]
    vp = ["diffusion={process: vp}", "diffusion.discrete=null", "preview.sampler.eta=0", "preview.sampler.name=null"]
    kinds = {"stages": ["model.decoder_channels=[12,8,4]"], "unified": one, "vp": [*one, *vp]}
    for name, changes in kinds.items():
        recipe = load_recipe("recipes/quickstart.yaml", [*small, *changes])
        assert run_local(recipe_mapping(recipe), folder / name, 1) == "finished"
    data = DataConfig(shards=str(digits), image_size=16, channels=1, num_classes=10)
    save_classifier(train_classifier(data, 50), folder / "classifier.safetensors")
    return folder


def _generator(run: Path) -> ImageGenerator:
    return ImageGenerator(open_weights(run), torch.device("cpu"))


def test_a_run_spliced_into_itself_is_itself(runs: Path) -> None:
    plain = _generator(runs / "stages")(range(6), SAMPLER, 0, LABELS)
    for lo, hi in ((0, 442), (442, 631), (631, 1000), (100, 700)):
        both = SplicedGenerator(_generator(runs / "stages"), _generator(runs / "stages"), lo, hi)
        assert torch.equal(both(range(6), SAMPLER, 0, LABELS), plain)


def test_each_network_has_its_own_times(runs: Path) -> None:
    """Compared with plain sampling from a function that chooses a whole model by the time of each evaluation."""
    models, partitions = [], []
    for name in ("stages", "unified"):
        weights = open_weights(runs / name)
        shared, stages = build_parts(weights.description.model, range(weights.description.model.num_stages))
        model = MultistageUNet(shared, stages.values())
        model.load_state_dict(weights.module_state(""))
        models.append(model.eval())
        partitions.append(weights.description.partition())
    about = open_weights(runs / "unified").description

    def choose(x, t, stage, label, context):  # type: ignore[no-untyped-def]
        which = 0 if 300 <= float(t[0]) < 700 else 1
        return models[which](x, t, partitions[which].stage_of(t), label=label)

    x0 = sample(choose, about.process(), about.partition(), SAMPLER, seed=0, index_n=range(6), shape=(1, 16, 16),
                condition=Condition(LABELS))  # fmt: skip
    expected = ((x0.clamp(-1, 1) + 1) * 127.5).round().byte()
    found = SplicedGenerator(_generator(runs / "stages"), _generator(runs / "unified"), 300, 700)
    assert (found(range(6), SAMPLER, 0, LABELS).int() - expected.int()).abs().max() <= 1


def test_report(msdiff: Msdiff, runs: Path, digits: Path, tmp_path: Path) -> None:
    common = ["--features", runs / "classifier.safetensors", "--data", digits, "--num", 20, "--steps", 4]
    out = tmp_path / "out"
    ended = msdiff("interval-report", runs / "stages", "--reference", runs / "unified", *common, "--out", out)
    assert ended.status == 0, ended.output
    rows = list(csv.DictReader((out / "intervals.csv").read_text().splitlines()))
    assert [(row["lo"], row["hi"]) for row in rows] == [
        ("", ""), ("0", "442.0"), ("442.0", "631.0"), ("631.0", "1000"), ("0", "1000"),
    ]  # fmt: skip
    classifier = load_classifier(runs / "classifier.safetensors")
    reference = torch.cat([x for x, _ in read_images(DataConfig(shards=str(digits), image_size=16, channels=1))])

    def distance(run: str) -> float:
        images = _generator(runs / run)(range(20), SamplerConfig(steps=4), 0, torch.arange(20) % 10)
        with torch.no_grad():
            a, b = (fit(classifier.features(x).double().numpy()) for x in (images, reference))
        return frechet_distance(a, b)

    assert float(rows[0]["score"]) == pytest.approx(distance("unified"), rel=1e-4)
    assert float(rows[-1]["score"]) == pytest.approx(distance("stages"), rel=1e-4)
    assert "[442, 631)" in (out / "intervals.md").read_text()
    assert (out / "intervals.png").stat().st_size > 1000

    def refused(*arguments: object) -> str:
        ended = msdiff("interval-report", runs / "stages", *common, *arguments)
        assert ended.status == 2, ended.output
        return ended.output

    new = tmp_path / "new"
    assert "diffusion.process = 'vp'" in refused("--reference", runs / "vp", "--out", new)
    assert "outside the process" in refused("--reference", runs / "unified", "--out", new, "--intervals", "442,2000")
    assert "no list" in refused("--reference", runs / "unified", "--out", new, "--intervals", "a,b")
    assert "exists already" in refused("--reference", runs / "unified", "--out", out)
    assert not new.exists()


def test_budget_and_end_of_sampling(msdiff: Msdiff, runs: Path, tmp_path: Path) -> None:
    def images(name: str, *options: object) -> np.ndarray:
        ended = msdiff("sample", runs / "vp", "--num", 2, "--out", tmp_path / name, *options)
        assert ended.status == 0, ended.output
        return np.stack([np.asarray(Image.open(tmp_path / name / f"{i:05d}.png")) for i in range(2)])

    assert (images("nfe", "--nfe", 7) == images("steps", "--steps", 7)).all()
    assert (images("end", "--nfe", 7, "--end", 0.3) != images("again", "--nfe", 7)).any()

    def refused(run: str, *options: object) -> str:
        ended = msdiff("sample", runs / run, "--out", tmp_path / "no", *options)
        assert ended.status == 2
        assert not (tmp_path / "no").exists()
        return ended.output

    assert "--nfe = 2: dpm_3s needs at least 3 evaluations" in refused("vp", "--nfe", 2)
    assert "--nfe = 2000" in refused("unified", "--nfe", 2000)
    assert "--end = 2.0" in refused("vp", "--end", 2)
    assert "--end = 1.0: a discrete process" in refused("unified", "--end", 1)
    assert "beside --steps 5" in refused("vp", "--nfe", 5, "--steps", 5)


def test_gradients_of_a_run_divide_time(msdiff: Msdiff, runs: Path) -> None:
    ended = msdiff("stages", "cluster", "--method", "gradient", "--run", runs / "unified", "--stages", 3, "--json")
    assert ended.status == 0, ended.output
    found = json.loads(ended.output[ended.output.index("{") : ended.output.rindex("}") + 1])
    assert (found["method"], found["process"], found["unit"]) == ("gradient", "discrete", "timestep")
    assert 0 < found["boundaries"][0] < found["boundaries"][1] < 1000
