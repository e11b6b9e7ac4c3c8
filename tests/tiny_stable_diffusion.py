"""A Stable Diffusion folder with random weights, small enough for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 32  # of the text encoder's tokens
LENGTH = 77
SIZE = 16  # of images; latents have half of it
SYLLABLES = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("b", "i"), ("bi", "r"), ("bir", "d</w>")]


def make_stable_diffusion(folder: Path, *, scheduler: dict[str, Any] | None = None, **unet: Any) -> Path:
    """Write a folder that `StableDiffusionPipeline.from_pretrained` loads.

    Args:
        scheduler: changes to the scheduler's configuration.
        unet: changes to the U-Net's configuration.
    """
    torch.manual_seed(0)
    tokenizer = tokenizer_of_letters()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    shape: dict[str, Any] = {
        "sample_size": SIZE // 2, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": WIDTH,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2,
    }  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=SIZE,
    )  # fmt: skip
    schedule: dict[str, Any] = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1,
    }  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=UNet2DConditionModel(**shape | unet),
        scheduler=DDIMScheduler(**schedule | (scheduler or {})), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def tokenizer_of_letters() -> CLIPTokenizer:
    """A byte-pair tokenizer that knows single characters and a few syllables."""
    return CLIPTokenizer(vocab=_vocabulary(), merges=SYLLABLES, model_max_length=LENGTH)


def write_old_tokenizer(folder: Path) -> None:
    """The same tokenizer in the files that folders have had since Stable Diffusion 1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in SYLLABLES))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": LENGTH, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"})
    )


def _vocabulary() -> dict[str, int]:
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in SYLLABLES)]
    return {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
