"""Shipped recipes made to fit shards of a user's images: they load, and training reads the images as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdiff_dist.apps.finetuning_recipe import InitChoices
from msdiff_dist.apps.init_recipe import init_recipe
from msdiff_dist.apps.train.found_data import find_data
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.data.make.pack import PackOptions, pack
from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.recipe import load_recipe
from msdiff_dist.shipped import shipped_files

RECIPES = [file.name for file in shipped_files() if file.kind == "recipe" and file.name != "debug"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of shards: `colour` of two classes and several sizes, `grey` squares of 32 pixels without classes."""
    root = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, channels, sizes in (("colour", (3,), [(40, 50), (33, 20)]), ("grey", (), [(32, 32)])):
        for i in range(12):
            folder = root / f"{name}-images" / ("ab"[i % 2] if channels else "")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (*sizes[i % len(sizes)], *channels), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        pack(root / f"{name}-images", root / name, PackOptions())
    return root


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["colour", "grey"])
def test_every_recipe_reads_the_images(name: str, kind: str, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    before = load_recipe(next(file.path for file in shipped_files() if file.name == name))
    size = 256 if before.data.kind == "latent" and before.encode.data is None else None
    if kind == "grey" and (before.data.context_shape is not None or name.startswith("cin256")):
        with pytest.raises(DataError, match="no captions" if before.data.context_shape else "no classes"):
            init_recipe(name, None, out, InitChoices(data=str(shards / kind), size=size))
        assert not out.exists()
        return
    init_recipe(name, None, out, InitChoices(data=str(shards / kind), size=size))
    recipe = load_recipe(out)
    images = recipe.data if recipe.data.kind == "image" else recipe.encode.data
    assert images is not None
    assert recipe.name == "mine"
    known = before.data if before.encode.data is None else before.encode.data
    assert images.image_size == (size or known.image_size)
    has_classes = before.data.num_classes is not None and kind == "colour"
    assert recipe.data.num_classes == recipe.model.num_classes == (2 if has_classes else None)
    batch = next(iter(StepLoader(images, 0, 12, index=find_data(images).shards)))
    assert batch.x_nCHW.shape[1:] == images.x_shape
    if recipe.data.kind == "image":
        assert images.channels == (3 if kind == "colour" else 1)


def test_the_size_may_be_given(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "mine.yaml"
    init_recipe("fashion_mnist_3stage", None, out, InitChoices(data=str(shards / "grey"), size=64))
    recipe = load_recipe(out)
    assert (recipe.data.image_size, recipe.data.resize, recipe.train.condition_dropout) == (64, "cover", 0.0)


def test_what_does_not_fit_is_refused(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    for name, data, size, field in (
        ("cin256_ldm_3stage", shards / "grey", None, "--size"),
        ("fashion_mnist_3stage", tmp_path / "none", None, "data.shards"),
        ("slurm/gpu", shards / "grey", None, "NAME"),
        ("fashion_mnist_3stage", shards / "grey", 33, "model"),
    ):
        with pytest.raises((ConfigError, DataError)) as refused:
            init_recipe(name, None, out, InitChoices(data=str(data), size=size))
        assert refused.value.field.startswith(field)
        assert not out.exists()
