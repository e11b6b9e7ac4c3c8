"""`msdiff init --from` the folder of a Stable Diffusion: recipes that plan and start, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdiff_dist.apps.finetuning_recipe import InitChoices
from msdiff_dist.apps.init_recipe import init_recipe
from msdiff_dist.apps.train.warm_start import start_weights
from msdiff_dist.data.make.pack import pack
from msdiff_dist.errors import CheckpointError, ConfigError, DataError, UserError
from msdiff_dist.recipe import load_recipe
from tests.tiny_stable_diffusion import make_stable_diffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stable_diffusion(tmp_path_factory.mktemp("sd") / "sd")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two images of different sizes with captions."""
    (tmp_path / "images").mkdir()
    for i, size in enumerate(((20, 30), (40, 24))):
        Image.fromarray(np.full((*size, 3), 90 * i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"image {i}")
    pack(tmp_path / "images", tmp_path / "shards")
    return tmp_path / "shards"


def test_the_recipe_is_that_of_the_folder_in_the_papers_stages(folder: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "birds.yaml"
    made = init_recipe(None, folder, out, InitChoices(data=str(shards)))
    start = tmp_path / "new" / "birds_start"
    assert made.written == [out, start]
    recipe = load_recipe(out)
    assert recipe.name == "birds"
    assert recipe.stages.boundaries == (442, 631)
    assert recipe.model.decoder_channels == (16, 16, 16)
    assert recipe.autoencoder.path == str(start / "autoencoder")
    assert recipe.text_encoder is not None
    assert (recipe.text_encoder.kind, recipe.text_encoder.name) == ("clip", str(start / "text"))
    assert recipe.data.context_shape == (77, 32)
    assert recipe.data.latent_shape == (4, 8, 8)
    assert recipe.data.shards == f"{shards}-latents"
    assert recipe.encode.data is not None
    assert (recipe.encode.data.shards, recipe.encode.data.image_size) == (str(shards), 16)
    weights = start_weights(recipe, tmp_path / "none")  # raises unless the recipe's model is that of the weights
    assert weights is not None
    settings = recipe.diffusion.settings()
    assert (settings.beta_start, settings.beta_end, settings.prediction_type) == (0.00085, 0.012, "epsilon")


def test_choices_of_stages_and_size(folder: Path, tmp_path: Path) -> None:
    choices = InitChoices(boundaries=(500.0,), widths=(16, 8), size=32)
    init_recipe(None, folder, tmp_path / "two.yaml", choices)
    recipe = load_recipe(tmp_path / "two.yaml")
    assert recipe.stages.boundaries == (500,)
    assert recipe.model.decoder_channels == (16, 8)
    assert recipe.data.latent_shape == (4, 16, 16)
    assert recipe.data.shards == "path/to/images-latents"
    init_recipe(None, folder, tmp_path / "one.yaml", InitChoices(boundaries=()))
    assert load_recipe(tmp_path / "one.yaml").model.num_stages == 1


def test_boundaries_follow_the_length_of_the_process(tmp_path: Path) -> None:
    source = make_stable_diffusion(tmp_path / "sd", scheduler={"num_train_timesteps": 500, "prediction_type": "sample"})
    init_recipe(None, source, tmp_path / "short.yaml")
    recipe = load_recipe(tmp_path / "short.yaml")
    assert recipe.stages.boundaries == (221, 316)
    assert recipe.diffusion.settings().prediction_type == "sample"


def _change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


INCOMPLETE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "has no folder vae. *Copy `vae`"),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "has no folder text_encoder"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "has no folder tokenizer"),
    "no U-Net": (lambda f: shutil.rmtree(f / "unet"), "has no folder unet"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "has no folder scheduler"),
    "empty tokenizer": (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "neither vocab.json nor tokenizer.json"),
    "another autoencoder": (lambda f: _change(f / "vae/config.json", latent_channels=16), "16 channels, .* takes 4"),
    "no object": (lambda f: (f / "unet/config.json").write_text("[]"), "no JSON object"),
    "another text encoder": (
        lambda f: _change(f / "text_encoder/config.json", hidden_size=64),
        "not its U-Net's: its tokens are 64 wide",
    ),
    "LoRA": (lambda f: (f / "pytorch_lora_weights.safetensors").touch(), "a LoRA"),
    "SDXL": (lambda f: (f / "text_encoder_2").mkdir(), "Stable Diffusion XL"),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_folders_that_cannot_be_trained_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    change, message = INCOMPLETE[name]
    shutil.copytree(folder, tmp_path / "sd")
    change(tmp_path / "sd")
    with pytest.raises(CheckpointError, match=message):
        init_recipe(None, tmp_path / "sd", tmp_path / "out.yaml")
    assert [p.name for p in tmp_path.iterdir()] == ["sd"]


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        (InitChoices(size=33), ConfigError, "--size = 33: is no multiple of the autoencoder's 2"),
        (InitChoices(widths=(16, 16)), ConfigError, "--widths.*are 2 for 3 stages"),
        (InitChoices(boundaries=(2000.0,)), ConfigError, "boundaries"),
        (InitChoices(data="none"), UserError, "none"),
    ],
)
def test_choices_that_make_no_recipe_leave_nothing(
    folder: Path, tmp_path: Path, choices: InitChoices, error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message):
        init_recipe(None, folder, tmp_path / "out.yaml", choices)
    assert list(tmp_path.iterdir()) == []


def test_images_without_captions_are_refused(folder: Path, shards: Path, tmp_path: Path) -> None:
    for caption in (tmp_path / "images").glob("*.txt"):
        caption.unlink()
    pack(tmp_path / "images", tmp_path / "plain")
    with pytest.raises(DataError, match=r"--data.*without captions.*Put NAME\.txt"):
        init_recipe(None, folder, tmp_path / "out.yaml", InitChoices(data=str(tmp_path / "plain")))


def test_options_for_other_sources_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--boundaries.*folder of a Stable Diffusion"):
        init_recipe("quickstart", None, tmp_path / "a.yaml", InitChoices(boundaries=(5.0,)))
    init_recipe(None, folder, tmp_path / "one.yaml")
    with pytest.raises(ConfigError, match="--data = 'shards': has no effect"):
        init_recipe(None, tmp_path / "one_start", tmp_path / "b.yaml", InitChoices(data="shards"))
    (tmp_path / "one.yaml").unlink()
    with pytest.raises(ConfigError, match="one_start': exists already"):
        init_recipe(None, folder, tmp_path / "one.yaml")
