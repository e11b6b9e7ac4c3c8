"""The files that come with the package: every one described, and every copy as good as the original."""

from __future__ import annotations

from pathlib import Path

import pytest

from msdiff_dist.apps.ablation.config import load_ablation
from msdiff_dist.errors import ConfigError
from msdiff_dist.launch.cluster import load_cluster
from msdiff_dist.recipe import load_recipe
from msdiff_dist.shipped import Shipped, copy_shipped, shipped_files

ROOT = Path(__file__).parents[2]
FILES = shipped_files()


def test_all_files_are_there_and_described() -> None:
    named = {str(file.path.relative_to(ROOT)) for file in FILES}
    assert named == {str(p.relative_to(ROOT)) for f in ("recipes", "slurm") for p in (ROOT / f).rglob("*.yaml")}
    for file in FILES:
        assert file.description.endswith("."), file.name
        assert len(file.description) <= 118, file.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_copy_says_the_same(file: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # some name a file relative to the root
    out = tmp_path / "mine" / "copy.yaml"
    copied = copy_shipped(file.name, out)
    assert copied.written[0] == out
    assert not copied.kept
    for path in copied.written:
        assert "recipes/" not in path.read_text()
        assert "slurm/" not in path.read_text()
    if file.kind == "cluster":
        assert load_cluster(str(out)) == load_cluster(str(file.path))
    elif file.kind == "ablation":
        (mine, _), (original, _) = load_ablation(out, []), load_ablation(file.path, [])
        assert (mine.budget, mine.score, mine.changes) == (original.budget, original.score, original.changes)
        pairs = [(mine.recipe, original.recipe)]
        for name, variant in mine.variants.items():
            if "recipe" in variant:
                pairs.append((variant["recipe"], original.variants[name]["recipe"]))
        for copy, source in pairs:
            assert load_recipe(out.parent / copy) == load_recipe(file.path.parent / source)
    else:
        mine, original = load_recipe(out), load_recipe(file.path)
        if mine.text_encoder and original.text_encoder and mine.text_encoder != original.text_encoder:
            assert Path(mine.text_encoder.name).read_text() == Path(original.text_encoder.name).read_text()
            mine = load_recipe(out, [f"text_encoder.name={original.text_encoder.name}"])
        assert mine == original


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    out, beside = tmp_path / "mine.yaml", tmp_path / "fashion_mnist_3stage.yaml"
    beside.write_text("edited")
    copied = copy_shipped("fashion_mnist_efficiency", out)
    assert copied.kept == [beside]
    assert beside.read_text() == "edited"
    out.write_text("edited")
    with pytest.raises(ConfigError, match="exists already"):
        copy_shipped("quickstart", out)
    assert out.read_text() == "edited"


@pytest.mark.parametrize(("name", "hint"), [("quickstrt", "'quickstart'"), ("slurm/gpus", "'slurm/gpu'")])
def test_a_name_that_is_near(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean {hint}"):
        copy_shipped(name, tmp_path / "out.yaml")


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("quickstart", "`msdiff init quickstart`"),
        ("quickstart.yaml", "`msdiff init quickstart`"),
        ("mine/quickstart.yaml", "`msdiff init quickstart --out mine/quickstart.yaml`"),
        ("cifar10_full", "`msdiff init ablations/cifar10_full`"),
        ("no_such", "`msdiff recipes`"),
    ],
)
def test_a_recipe_that_is_not_there(path: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such file") as caught:
        load_recipe(path)
    assert command in caught.value.remedy


def test_a_cluster_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"`msdiff init slurm/cpu --out slurm/cpu\.yaml`"):
        load_cluster("slurm/cpu.yaml")
