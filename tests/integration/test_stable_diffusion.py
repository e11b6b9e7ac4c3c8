"""From the folder of a Stable Diffusion and images with captions to stages and a pipeline, by the guide's commands."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from msdiff_dist.data.tar_members import samples
from msdiff_dist.diffusion.sampling import image_generators
from tests.integration.conftest import Msdiff
from tests.tiny_stable_diffusion import SIZE, make_stable_diffusion

pytestmark = pytest.mark.integration
CAPTIONS = ["a red bird", "a cat"]


@torch.no_grad()
def test_from_a_folder_to_stages_and_back(tmp_path: Path, msdiff: Msdiff) -> None:
    folder, pictures = make_stable_diffusion(tmp_path / "sd"), tmp_path / "pictures"
    pictures.mkdir()
    draw = np.random.default_rng(0)
    for i in range(12):
        size = (SIZE, SIZE) if i < 2 else draw.integers(SIZE, 3 * SIZE, 2)
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(pictures / f"{i:02}.png")
        (pictures / f"{i:02}.txt").write_text(CAPTIONS[i % 2])
    shards, recipe, run = tmp_path / "images", tmp_path / "birds.yaml", tmp_path / "run"
    latents = tmp_path / "images-latents"
    for command in (
        ("data", "pack", pictures, "--out", shards),
        ("init", "--from", folder, "--data", shards, "--out", recipe),
        ("data", "encode", recipe, "encode.dtype=float32", "--out", latents),
    ):
        ended = msdiff(*command)
        assert ended.status == 0, ended.output

    # What is stored is what the folder's own networks make of the images.
    vae, text = AutoencoderKL.from_pretrained(folder / "vae"), CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    stored = {sample["__key__"]: sample for sample in samples(str(latents / "00000.tar"))}
    packed = {sample["__key__"]: sample for sample in samples(str(shards / "00000.tar"))}
    assert stored.keys() == packed.keys()
    assert len(packed) == 12
    compared = 0
    for key, sample in packed.items():
        image = Image.open(io.BytesIO(sample["png"]))
        tokens = tokenizer(
            sample["txt"].decode(), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        assert np.abs(stored[key]["context.npy"] - text(tokens.input_ids)[0][0].numpy()).max() <= 1e-5
        if image.size == (SIZE, SIZE):  # the others are scaled and cropped first
            pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
            posterior = vae.encode(pixels[None] / 127.5 - 1).latent_dist
            moments = torch.cat([posterior.mean, posterior.logvar], dim=1)[0]
            assert np.abs(stored[key]["latent.npy"] - moments.numpy()).max() <= 1e-5
            compared += 1
    assert compared >= 2

    shutil.rmtree(folder)  # the start weights bring all that follows needs
    few = ("train.steps=2", "train.global_batch_size=6", "data.lanes=1", "train.precision=fp32")
    trained = msdiff("train", recipe, *few, "data.latent_dtype=float32", "--run-dir", run)
    assert trained.status == 0, trained.output
    sampling = ("--prompt", CAPTIONS[0], "--guidance", 3, "--steps", 4, "--num", 2, "--seed", 5)
    sampled = msdiff("sample", run, *sampling, "--out", tmp_path / "sampled")
    assert sampled.status == 0, sampled.output
    converted = msdiff("convert", run, tmp_path / "out", "--from", "msdiff", "--to", "diffusers")
    assert converted.status == 0, converted.output

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    images = pipe(
        prompt=[CAPTIONS[0]] * 2, guidance_scale=3.0, num_inference_steps=4, output_type="np",
        generator=image_generators(5, range(2)),
    ).images  # fmt: skip
    shown = np.stack([np.asarray(Image.open(tmp_path / "sampled" / f"0000{i}.png")) for i in range(2)]) / 255
    assert shown.std() > 0.05
    assert np.abs(images - shown).max() <= 0.5 / 255 + 1e-4  # files have whole levels
