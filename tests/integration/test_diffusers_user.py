"""Three lines of diffusers on a converted model make the images that `msdiff sample` makes from the same noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel, VQModel
from PIL import Image

from msdiff_dist.convert.formats.export_folder import write_export
from msdiff_dist.convert.model_weights import ModelWeights
from msdiff_dist.convert.tensor_sources import MemorySource
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig
from msdiff_dist.diffusion.sampling import Condition, image_generators, sample
from msdiff_dist.diffusion.solvers import SamplerConfig
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.export.weights import open_weights
from msdiff_dist.models import build_model
from msdiff_dist.models.autoencoder import AutoencoderConfig
from msdiff_dist.models.ldm.config import LDMConfig
from tests.integration.conftest import Msdiff

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("default:.*holds the last weights:UserWarning"),  # what these convert
]
UNIFIED = LDMConfig(
    encoder_channels=32, decoder_channels=(32,), channel_mult=(1, 2), num_res_blocks=1, attention_downsamples=(2,),
    num_head_channels=32,
)  # fmt: skip
SEED, COUNT, STEPS = 5, 3, 8
TOLERANCE = 1e-4


def export(folder: Path, model: LDMConfig, autoencoder: torch.nn.Module | None = None) -> Path:
    """An export folder with random weights, small enough that sampling does not diverge."""
    network, draw = build_model(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=draw))
    codec = AutoencoderConfig(kind="vq", path="autoencoder", scale_factor=0.8) if autoencoder else AutoencoderConfig()
    description = ModelDescription(
        model=model, sample_size=8, weights="raw", autoencoder=codec,
        stages=StagesConfig(boundaries={1: (), 3: (442.0, 631.0)}[model.num_stages]),
        diffusion=DiffusionConfig(process="discrete", section=DiscreteConfig()),
    )  # fmt: skip
    write_export(ModelWeights(description=description, tensors=MemorySource(network.state_dict())), folder, {})
    if autoencoder:
        autoencoder.save_pretrained(folder / "autoencoder")  # type: ignore[operator]
    return folder


def before_rounding(folder: Path, labels: torch.Tensor | None = None) -> torch.Tensor:
    """What `msdiff sample` decodes, without its rounding to 256 levels."""
    weights = open_weights(folder, ema=False)
    description, generator = weights.description, ImageGenerator(weights, torch.device("cpu"))
    return sample(
        generator.network, description.process(), description.partition(), SamplerConfig(name="ddim", steps=STEPS),
        seed=SEED,
        index_n=range(COUNT), shape=description.latent_shape, condition=Condition(labels),
    )  # fmt: skip


def sampled_images(msdiff: Msdiff, folder: Path, out: Path) -> np.ndarray:
    """Images [n, H, W, C] that the command makes, in [0, 1]."""
    made = msdiff("sample", folder, "--raw", "--num", COUNT, "--seed", SEED, "--steps", STEPS, "--out", out)
    assert made.status == 0, made.output
    return np.stack([np.asarray(Image.open(out / f"{i:05d}.png")) for i in range(COUNT)]) / 255


@pytest.mark.parametrize("kind", ["unified", "stages of unequal widths"])
def test_the_exported_pipeline_makes_the_same_images(msdiff: Msdiff, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    vae = VQModel(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=8,
    )  # fmt: skip
    staged = replace(UNIFIED, decoder_channels=(64, 32, 32), num_classes=2)
    ours = export(tmp_path / "ours", UNIFIED if kind == "unified" else staged, None if kind == "unified" else vae)
    assert msdiff("convert", ours, tmp_path / "theirs", "--from", "msdiff", "--to", "diffusers").status == 0
    conditions: dict[str, Any] = {"batch_size": COUNT} if kind == "unified" else {"class_labels": [0, 1, 0]}
    conditions |= {"num_inference_steps": STEPS, "eta": 0.0}

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "theirs", trust_remote_code=True)
    images = pipe(generator=image_generators(SEED, range(COUNT)), output_type="np", **conditions).images

    assert type(pipe).__name__ == ("DDIMPipeline" if kind == "unified" else "MultistagePipeline")
    expected = sampled_images(msdiff, ours, tmp_path / "out")
    assert expected.std() > 0.05
    assert np.abs(images - expected).max() <= 0.5 / 255 + TOLERANCE
    if kind == "unified":
        latents = before_rounding(ours)
        exact = (latents / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        assert np.abs(images - exact).max() <= TOLERANCE
    else:
        call = {"generator": image_generators(SEED, range(COUNT)), "output_type": "latent"}
        latents = pipe(**call, **conditions).images
        assert (latents - before_rounding(ours, torch.tensor([0, 1, 0]))).abs().max() <= TOLERANCE


@torch.no_grad()
def test_stages_of_equal_widths_are_stock_networks_that_take_turns(msdiff: Msdiff, tmp_path: Path) -> None:
    ours = export(tmp_path / "ours", replace(UNIFIED, decoder_channels=(32, 32, 32)))
    unets = []
    for stage in range(3):
        theirs = tmp_path / f"stage_{stage}"
        convert = ("convert", ours, theirs, "--from", "msdiff", "--to", "diffusers", "--stage", stage)
        assert msdiff(*convert).status == 0
        unets.append(UNet2DModel.from_pretrained(theirs, subfolder="unet"))
    bounds = torch.tensor(json.loads((ours / "config.json").read_text())["stages"]["boundaries"])
    scheduler = DiffusionPipeline.from_pretrained(tmp_path / "stage_0").scheduler
    scheduler.set_timesteps(STEPS)
    x = torch.stack([torch.randn(3, 8, 8, generator=g) for g in image_generators(SEED, range(COUNT))])
    used = [int(torch.bucketize(t, bounds, right=True)) for t in scheduler.timesteps]
    assert set(used) == {0, 1, 2}
    for t, stage in zip(scheduler.timesteps, used, strict=True):
        x = scheduler.step(unets[stage](x, t).sample, t, x).prev_sample
    assert (x - before_rounding(ours)).abs().max() <= TOLERANCE
    images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - sampled_images(msdiff, ours, tmp_path / "out")).max() <= 0.5 / 255 + TOLERANCE
