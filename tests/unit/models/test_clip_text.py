"""The text encoder of a Stable Diffusion folder against transformers' own call."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from msdiff_dist.errors import ConfigError
from msdiff_dist.models.text_encoder import TextEncoder, TextEncoderConfig, open_text_encoder
from tests.tiny_stable_diffusion import LENGTH, WIDTH, make_stable_diffusion, write_old_tokenizer

CAPTIONS = ["", "a red bird", "A  Red cat!", "x " * 100]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stable_diffusion(tmp_path_factory.mktemp("sd") / "sd")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def opened(folder: Path) -> TextEncoder:
    return open_text_encoder(TextEncoderConfig(kind="clip", name=str(folder)), torch.device("cpu"))


@torch.no_grad()
def test_contexts_are_those_of_a_stock_pipeline(folder: Path) -> None:
    encoder = opened(folder)
    context, mask = encoder(CAPTIONS)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokens = tokenizer(CAPTIONS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    expected = CLIPTextModel.from_pretrained(folder / "text_encoder")(tokens.input_ids)[0]
    assert context.shape == (4, *encoder.context_shape) == (4, LENGTH, WIDTH)
    assert context.dtype == torch.float32
    assert (context - expected).abs().max() <= 1e-5
    assert expected.std() > 0.1
    assert mask.sum(1).tolist() == [2, 5, 6, LENGTH]  # begin and end, and the tokens between them


def _old_files(folder: Path) -> None:
    """What folders of 2022 have: a pickle, names below `text_model`, a tensor of positions, other tokenizer files."""
    weights = folder / "text_encoder" / "model.safetensors"
    state = {f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}
    torch.save(state | {"text_model.embeddings.position_ids": torch.arange(LENGTH)[None]},
               folder / "text_encoder" / "pytorch_model.bin")  # fmt: skip
    weights.unlink()
    shutil.rmtree(folder / "tokenizer")
    write_old_tokenizer(folder / "tokenizer")


def _half_variant(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(folder / "text_encoder" / "model.fp16.safetensors")


@pytest.mark.parametrize("change", [_old_files, _half_variant])
def test_other_files_of_the_same_encoder_are_the_same_encoder(
    folder: Path, copy: Path, change: Callable[[Path], None]
) -> None:
    change(copy)
    one, other = opened(folder), opened(copy)
    assert torch.equal(one(CAPTIONS)[0], other(CAPTIONS)[0])
    assert one.identity == other.identity


def test_half_precision_is_computed_with_in_fp32(copy: Path) -> None:
    weights = copy / "text_encoder" / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert opened(copy)(["cat"])[0].dtype == torch.float32


def test_other_weights_and_other_tokens_are_another_encoder(folder: Path, copy: Path) -> None:
    weights = copy / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    state["final_layer_norm.bias"][0] += 1e-3
    save_file(state, weights, {"format": "pt"})
    changed = opened(copy).identity
    shutil.copy(folder / "text_encoder" / "model.safetensors", weights)
    tokenizer = copy / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(tokenizer.read_text())
    tokenizer.write_text(json.dumps({**settings, "model_max_length": 20}))
    assert len({opened(folder).identity, changed, opened(copy).identity}) == 3
    assert opened(copy).context_shape == (20, WIDTH)


def _without_a_tensor(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    del state["final_layer_norm.bias"]
    save_file(state, weights, {"format": "pt"})


def _of_another_class(folder: Path) -> None:
    (folder / "text_encoder" / "config.json").write_text(json.dumps({"architectures": ["T5EncoderModel"]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "holds no folder text_encoder"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "holds no folder tokenizer"),
        (_without_a_tensor, r"cannot be loaded .*1 tensors are missing, such as .*final_layer_norm\.bias"),
        (_of_another_class, "class T5EncoderModel"),
        (lambda folder: (folder / "text_encoder/config.json").write_text("{"), "config.json that cannot be read"),
        (lambda folder: (folder / "tokenizer/tokenizer.json").write_text("{"), "cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_named(copy: Path, change: Callable[[Path], object], message: str) -> None:
    change(copy)
    with pytest.raises(ConfigError, match=message) as caught:
        opened(copy)
    assert caught.value.field == "text_encoder.name"


def test_fields_of_open_clip_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer.*no meaning for kind 'clip'"):
        TextEncoderConfig(kind="clip", name="x", layer="last")
