"""Folders of Stable Diffusion: there and back they make the images that diffusers' own pipeline makes of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from msdiff_dist.convert.conversion import convert
from msdiff_dist.convert.editing import grow
from msdiff_dist.convert.formats.diffusers_folder import read_diffusers
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.errors import CheckpointError
from tests.tiny_stable_diffusion import WIDTH, make_stable_diffusion

PROMPTS, NEGATIVE = ["a red bird", "cat"], ["red", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stable_diffusion(tmp_path_factory.mktemp("sd") / "sd")


@pytest.fixture(scope="module")
def grown(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of three stages that are copies of the folder's."""
    out = tmp_path_factory.mktemp("grown")
    grow(folder, out / "msdiff", (442, 631), (16, 16, 16), from_format="diffusers")
    convert(out / "msdiff", out / "diffusers", "msdiff", "diffusers")
    return out / "diffusers"


def opened(folder: Path, kind: Any = DiffusionPipeline) -> Any:
    pipe = kind.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, scheduler: Any) -> np.ndarray:
    """Images [2, H, W, C] of two prompts from the same noise, by the same DDIM sampler."""
    pipe.scheduler = DDIMScheduler.from_config(scheduler)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    call = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "guidance_scale": 5.0, "num_inference_steps": 6}
    images: np.ndarray = pipe(latents=noise, output_type="np", **call).images
    return images


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_there_and_back_is_the_stock_pipeline(folder: Path, tmp_path: Path, prediction: str) -> None:
    if prediction != "epsilon":
        folder = make_stable_diffusion(tmp_path / "v", scheduler={"prediction_type": prediction})
    convert(folder, tmp_path / "ours", "diffusers", "msdiff")
    convert(tmp_path / "ours", tmp_path / "back", "msdiff", "diffusers")
    before, after = opened(folder, StableDiffusionPipeline), opened(tmp_path / "back", StableDiffusionPipeline)
    assert after.scheduler.config.prediction_type == prediction
    expected = drawn(before, before.scheduler.config)
    assert expected.std() > 0.1
    assert np.abs(drawn(after, before.scheduler.config) - expected).max() <= 1e-4
    for name in ("unet", "vae", "text_encoder"):
        (file,) = (folder / name).glob("*.safetensors")
        (written,) = (tmp_path / "back" / name).glob("*.safetensors")
        theirs, ours = load_file(file), load_file(written)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_stages_that_are_copies_make_the_stock_pipelines_images(folder: Path, grown: Path) -> None:
    stock, staged = opened(folder, StableDiffusionPipeline), opened(grown)
    assert type(staged).__name__ == "MultistagePipeline"
    expected = drawn(stock, stock.scheduler.config)
    assert np.abs(drawn(staged, stock.scheduler.config) - expected).max() <= 1e-4


def test_one_prompt_for_several_images_in_another_size(grown: Path) -> None:
    images = opened(grown)(
        "cat", num_images_per_prompt=2, negative_prompt="red", guidance_scale=2.0, height=32, width=48,
        num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert images.shape == (2, 3, 32, 48)
    assert not torch.equal(images[0], images[1])


WRONG_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "give prompt or prompt_embeds"),
    "no text": ({"prompt": 3}, "must be text or a list of texts, not 3"),
    "both": ({"prompt": "a", "prompt_embeds": torch.zeros(1, 77, WIDTH)}, "prompt and prompt_embeds are both given"),
    "embeds": ({"prompt_embeds": torch.zeros(1, 77, 31)}, r"must be \[images, tokens, 32\] .* not \[1, 77, 31\]"),
    "height": ({"prompt": "a", "height": 33}, "height is 33 pixels; it must be a multiple of 4"),
    "classes": ({"prompt": "a", "class_labels": [1]}, "this model has no classes"),
    "latents": ({"prompt": "a", "latents": torch.zeros(2, 4, 8, 8)}, r"latents must be \[1, 4, height, width\]"),
    "size": ({"prompt": "a", "height": 32, "latents": torch.zeros(1, 4, 8, 8)}, r"latents must be \[1, 4, 16, width\]"),
    "output": ({"prompt": "a", "output_type": "png"}, "output_type is 'png'; it must be one of pil, np, pt, latent"),
    "generators": ({"prompt": "a", "generator": [torch.Generator()] * 2}, "2 generators are given for 1 images"),
    "negative": (
        {"prompt": ["a"] * 3, "negative_prompt": ["a"] * 2, "guidance_scale": 2.0}, "one for all or one for each"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls_get_a_sentence(grown: Path, name: str) -> None:
    call, message = WRONG_CALLS[name]
    with pytest.raises(ValueError, match=message):
        opened(grown)(**call)


def test_what_only_some_pipelines_have(grown: Path) -> None:
    pipe = opened(grown)
    with pytest.raises(TypeError, match="unexpected keyword argument 'prompts'"):
        pipe(prompts="cat")
    pipe.register_modules(text_encoder=None)
    with pytest.raises(ValueError, match="prompt needs a text encoder and its tokenizer, and this pipeline has none"):
        pipe("cat")
    with pytest.raises(ValueError, match="guidance needs negative_prompt_embeds"):
        pipe(prompt_embeds=torch.zeros(1, 77, WIDTH), guidance_scale=2.0)


def _half_and_old(folder: Path) -> None:
    """Files as many folders have them: half precision by name, and a pickle."""
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: t.half() for k, t in load_file(unet).items()}, unet.with_suffix(".fp16.safetensors"))
    unet.unlink()
    for name, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        (file,) = (folder / name).glob("*.safetensors")
        torch.save(load_file(file), folder / name / f"{stem}.bin")
        file.unlink()


def _averaged_beside(folder: Path) -> None:
    shutil.copytree(folder / "unet", folder / "unet_ema")


def _without_an_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


@pytest.mark.parametrize("change", [_half_and_old, _averaged_beside, _without_an_index])
def test_folders_as_people_have_them(folder: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    shutil.copytree(folder, tmp_path / "sd")
    change(tmp_path / "sd")
    found, plain = (read_diffusers(path, ConvertOptions()) for path in (tmp_path / "sd", folder))
    assert found.description == plain.description
    for frozen in ("autoencoder_weights", "text_encoder_weights"):
        ours, theirs = getattr(found, frozen).tensors, getattr(plain, frozen).tensors
        assert all(torch.equal(ours.read(name), theirs.read(name)) for name in theirs.names())
    for name in plain.tensors.names():
        assert torch.allclose(found.tensors.read(name).float(), plain.tensors.read(name), atol=1e-3)


def _change(folder: Path, file: str, **fields: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "SDXL": (lambda f: (f / "text_encoder_2").mkdir(), "Stable Diffusion XL"),
    "SDXL's U-Net": (lambda f: _change(f, "unet/config.json", addition_embed_type="text_time"), "Stable Diffusion XL"),
    "SD3": (lambda f: (f / "unet").rename(f / "transformer"), "a diffusion transformer and no U-Net"),
    "inpainting": (lambda f: _change(f, "unet/config.json", in_channels=9), "an inpainting model"),
    "LoRA": (lambda f: (f / "pytorch_lora_weights.safetensors").touch(), "a LoRA.*fuse_lora"),
    "shift": (lambda f: _change(f, "vae/config.json", shift_factor=0.1), "shift_factor"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    change, message = OTHERS[name]
    shutil.copytree(folder, tmp_path / "sd")
    change(tmp_path / "sd")
    with pytest.raises(CheckpointError, match=message):
        read_diffusers(tmp_path / "sd", ConvertOptions())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: shutil.rmtree(f / "tokenizer"), "has no folder tokenizer"),
        (lambda f: _change(f, "text_encoder/config.json", architectures=["T5EncoderModel"]), "T5EncoderModel"),
        (lambda f: _change(f, "text_encoder/config.json", hidden_size=64), "its tokens are 64 wide, .* takes 32"),
    ],
)
def test_a_conversion_says_why_the_text_encoder_stays_behind(
    folder: Path, tmp_path: Path, change: Callable[[Path], object], reason: str
) -> None:
    shutil.copytree(folder, tmp_path / "sd")
    change(tmp_path / "sd")
    report = convert(tmp_path / "sd", tmp_path / "ours", "diffusers", "msdiff")

    left_out = report["keys"]["text_encoder/"]["left_out"]
    assert re.search(reason, left_out), left_out
    onwards = convert(tmp_path / "ours", tmp_path / "back", "msdiff", "diffusers")
    assert any("prompt_embeds instead of a prompt" in remark for remark in onwards["remarks"])
