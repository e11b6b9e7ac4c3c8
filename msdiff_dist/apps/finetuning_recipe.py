"""`msdiff init --from` a Stable Diffusion folder: its U-Net grown to stages, and the recipe that trains them further.

The start weights are an export beside the recipe, with the folder's autoencoder, text encoder and tokenizer in it. So
runs, samples and conversions of them need the folder no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msdiff_dist.apps.recipe_for_data import look_at
from msdiff_dist.config import to_mapping
from msdiff_dist.convert.conversion import read, write
from msdiff_dist.convert.edit.stages import grow
from msdiff_dist.convert.formats.frozen_networks import AUTOENCODER, TEXT, read_text_encoder
from msdiff_dist.convert.formats.ldm import PAPER_BOUNDARIES
from msdiff_dist.convert.formats.model_folder import json_of
from msdiff_dist.convert.model_weights import ModelWeights
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.convert.recognition import refuse_other_pipelines
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig
from msdiff_dist.errors import CheckpointError, ConfigError, DataError
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.recipe import Recipe, recipe_from
from msdiff_dist.shipped import refuse_existing

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_PAPER_TIMESTEPS = 1000  # of the process that the paper's boundaries divide


@dataclass(frozen=True, kw_only=True)
class InitChoices:
    """The options of `msdiff init`.

    Attributes:
        data: shards of images that the recipe is made to fit; None leaves a name to fill in, or a shipped recipe's.
        size: pixels a side of the images; None takes the size that the network, or the shipped recipe, is for.
        boundaries: inner stage boundaries of a Stable Diffusion; () for one stage, None for the paper's.
        widths: width of each of its decoders, stage 0 first; None: as wide as the folder's U-Net.
    """

    data: str | None = None
    size: int | None = None
    boundaries: tuple[float, ...] | None = None
    widths: tuple[int, ...] | None = None


def is_text_to_image(folder: Path) -> bool:
    """Whether a folder of diffusers holds a pipeline with text, or a variant or part of one that can be named."""
    refuse_other_pipelines(folder)
    unet = folder / "unet" / "config.json"
    if unet.is_file():
        return json_of(unet).get("cross_attention_dim") is not None
    index = folder / "model_index.json"
    return index.is_file() and "text_encoder" in json_of(index)


def start_finetuning(folder: Path, out: Path, choices: InitChoices) -> tuple[Recipe, Path]:
    """Write the start weights beside `out`; returns the recipe that is to be written there, and their folder.

    Args:
        folder: a Stable Diffusion 1 or 2 as diffusers has it: unet, vae, text_encoder, tokenizer, scheduler.

    Raises:
        CheckpointError: the folder is incomplete, or holds another kind of model.
        ConfigError: the choices do not make a model, or the start weights exist already.
        DataError: the shards cannot be read, or have no captions.
    """
    start = out.with_name(f"{out.stem}_start")
    refuse_existing(start)
    for part in _PARTS:
        if not (folder / part).is_dir():
            raise CheckpointError(
                "--from", str(folder), f"has no folder {part}",
                f"Copy `{part}` of the model that it was made from into it, or of another one that its U-Net fits.",
            )  # fmt: skip
    read_text_encoder(folder)  # raises where a conversion would go on without it
    weights = read(folder, "diffusers", ConvertOptions())
    if weights.text_encoder_weights is None:
        raise CheckpointError(
            "--from", str(folder), f"has a text encoder that is not its U-Net's: {weights.left_out['text_encoder/']}",
            "Take text_encoder and tokenizer of the model that the U-Net was made from.",
        )  # fmt: skip
    vae = weights.autoencoder_weights
    channels = vae.config.get("latent_channels", 4) if vae else None
    if channels != weights.model.in_channels:
        raise CheckpointError(
            "--from", str(folder), f"has an autoencoder with latents of {channels} channels, and its U-Net takes "
            f"{weights.model.in_channels}", "Take the autoencoder of the model that the U-Net was made from.",
        )  # fmt: skip
    grown = _grown(weights, choices)
    recipe = recipe_from(_mapping(grown, out, start, choices))
    write(grown, start, "msdiff", ConvertOptions(), {"path": str(folder), "format": "diffusers"})
    return recipe, start


def _grown(weights: ModelWeights, choices: InitChoices) -> ModelWeights:
    """The model in stages."""
    process = weights.description.diffusion.settings()
    assert isinstance(process, DiscreteConfig)
    boundaries = choices.boundaries
    if boundaries is None:
        boundaries = tuple(round(b * process.timesteps / _PAPER_TIMESTEPS) for b in PAPER_BOUNDARIES)
    own = weights.model.decoder_channels[0]
    return grow(weights, boundaries, choices.widths or (own,) * (len(boundaries) + 1))


def _mapping(grown: ModelWeights, out: Path, start: Path, choices: InitChoices) -> dict[str, Any]:
    """The recipe as plain data."""
    description = grown.description
    assert description.text_encoder is not None
    networks = {
        "autoencoder": to_mapping(replace(description.autoencoder, path=str(start / AUTOENCODER))),
        "text_encoder": to_mapping(replace(description.text_encoder, name=str(start / TEXT))),
    }
    assert grown.autoencoder_weights is not None
    size, latent = _sizes(description, grown.autoencoder_weights.config, choices.size)
    data = choices.data or "path/to/images"
    if choices.data is not None and not look_at(choices.data).captions:
        raise DataError(
            "--data", choices.data, "has images without captions",
            "Put NAME.txt beside every image and pack again.",
        )  # fmt: skip
    return {
        "name": out.stem,
        "data": {
            "shards": f"{data.rstrip('/')}-latents",
            "kind": "latent",
            "lanes": 96,
            "latent_shape": [description.model.in_channels, latent, latent],
            "latent_moments": True,
            "context_shape": description.context_shape,
        },
        "encode": {
            "data": {"shards": data, "image_size": size, "resize": "cover", "captions": True},
            "store": "moments",
        },
        **{part: to_mapping(getattr(description, part)) for part in ("model", "stages", "diffusion")},
        **networks,
        "optimizer": {"lr": 1e-5},
        "lr_schedule": {"warmup_steps": 500},
        "ema": {"decay": 0.999},
        "train": {
            "steps": 5000, "global_batch_size": 96, "precision": "auto", "condition_dropout": 0.1,
            "init_from": str(start),
        },
    }  # fmt: skip


def _sizes(description: ModelDescription, vae: Mapping[str, Any], size: int | None) -> tuple[int, int]:
    """Pixels a side of the images and of their latents.

    Raises:
        ConfigError: the U-Net does not say for which size it is, or the autoencoder does not divide the size.
    """
    factor = 2 ** (len(vae.get("block_out_channels", [64])) - 1)  # diffusers' default
    own = description.sample_size
    if size is None:
        if not isinstance(own, int):
            problem = f"is needed: the U-Net's sample_size is {own}"
            raise ConfigError("--size", None, problem, "Give the pixels a side of the images.")
        return own * factor, own
    if size % factor:
        problem = f"is no multiple of the autoencoder's {factor}"
        raise ConfigError("--size", size, problem, f"Use {size // factor * factor or factor}.")
    return size, size // factor
