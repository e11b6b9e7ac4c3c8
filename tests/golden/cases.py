"""Small recipes that together cover all of training, and the shards that they read, made with numpy alone."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from msdiff_dist.data.latent_blocks import BLOCK_FIELD, pack_block
from msdiff_dist.data.make.shard_writer import Fields, encode_image, write_index, write_shard
from msdiff_dist.recipe import Recipe, recipe_from

SIZES = (7, 5, 9, 6, 8, 4)  # uneven, so that lanes end at different times; three batches of 20 reach into epoch 1
BATCH = 20  # not a multiple of three stages: quotas are rounded
STEPS = 8
CLASSES = 3

DATA: dict[str, Any] = {"lanes": 4, "shuffle": 3, "num_classes": CLASSES}
# One thread: on tiny networks more threads are slower.
TRAIN: dict[str, Any] = {
    "steps": STEPS, "global_batch_size": BATCH, "condition_dropout": 0.3, "seed": 5, "threads": 1, "precision": "fp32"
}  # fmt: skip
LDM: dict[str, Any] = {
    "family": "ldm", "encoder_channels": 8, "decoder_channels": [12, 8, 4], "channel_mult": [1, 2],
    "num_res_blocks": 1, "attention_downsamples": [2], "num_heads": 2, "norm_groups": 4,
}  # fmt: skip
SONG: dict[str, Any] = {
    "encoder_channels": 8, "decoder_channels": [12, 8, 4], "channel_mult": [1, 2], "num_res_blocks": 1,
    "attention_downsamples": [2], "num_classes": CLASSES,
}  # fmt: skip
ADAMW: dict[str, Any] = {"lr": 2e-3, "eps": 1e-6, "grad_clip": 1.0}  # a large eps does not amplify rounding


def discrete_images(folder: Path) -> dict[str, Any]:
    """LDM's process and U-Net on grey images, flipped; averages of a decay with warm-up, and power averages."""
    write_images(folder / "images", channels=1)
    return {
        "data": DATA | {"shards": str(folder / "images"), "image_size": 8, "channels": 1, "flip": True},
        "stages": {"boundaries": [442, 631], "sampling": "equal"},
        "model": LDM | {"in_channels": 1, "out_channels": 1, "num_classes": CLASSES},
        "optimizer": ADAMW,
        "lr_schedule": {"kind": "cosine", "warmup_steps": 3, "final_fraction": 0.1},
        "ema": {"decay": 0.4, "power": {"snapshot_every": 2}},
        "train": TRAIN,
    }


def edm_images(folder: Path) -> dict[str, Any]:
    """EDM with NCSN++ on augmented RGB images, two micro batches a step, averages of a half-life."""
    write_images(folder / "images", channels=3)
    return {
        "data": DATA | {"shards": str(folder / "images"), "image_size": 8},
        "diffusion": {"process": "edm"},
        "stages": {"boundaries": [0.2, 0.6], "sampling": "uniform"},
        "model": SONG | {"family": "ncsnpp", "augment_labels": 9},
        "augmentation": {"probability": 0.5},
        "optimizer": {"name": "adam", "lr": 2e-3, "eps": 1e-6},
        "lr_schedule": {"warmup_steps": 4},
        "ema": {"halflife_images": 30, "warmup_ratio": 0.3},
        "train": TRAIN | {"gradient_accumulation_steps": 2},
    }


def vp_latents(folder: Path) -> dict[str, Any]:
    """The VP process with DDPM++ and dropout on moments of latents, flipped; weighted stages."""
    write_latents(folder / "latents", shape=(2, 8, 8), moments=True)
    return {
        "data": DATA
        | {"kind": "latent", "shards": str(folder / "latents"), "latent_shape": [2, 8, 8], "latent_dtype": "float32"}
        | {"latent_moments": True, "flip": True},
        "diffusion": {"process": "vp", "vp": {"min_snr_gamma": 5.0}},
        "stages": {"boundaries": [0.442, 0.6308], "sampling": [3, 2, 1]},
        "model": SONG | {"family": "ddpmpp", "in_channels": 2, "out_channels": 2, "dropout": 0.2},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "grad_clip": 1.0},
        "ema": {"decay": 0.7, "warmup": False},
        "train": TRAIN,
    }


def mixed_text_latents(folder: Path) -> dict[str, Any]:
    """Text contexts beside latents of two sources, blocks and single samples; v-prediction."""
    write_latents(folder / "blocks", shape=(2, 8, 8), tokens=(3, 8), block=4)
    write_latents(folder / "samples", shape=(2, 8, 8), tokens=(3, 8), first=100)
    sources = [{"shards": str(folder / "blocks"), "weight": 2}, {"shards": str(folder / "samples")}]
    return {
        "data": DATA
        | {"kind": "latent", "sources": sources, "latent_shape": [2, 8, 8], "context_shape": [3, 8]}
        | {"num_classes": None},
        "autoencoder": {"scale_factor": 0.5},
        "diffusion": {"process": "discrete", "discrete": {"prediction_type": "v_prediction"}},
        "stages": {"boundaries": [300, 700], "sampling": "uniform"},
        "model": LDM | {"in_channels": 2, "out_channels": 2, "context_dim": 8},
        "optimizer": ADAMW | {"weight_decay": 0.1},
        "train": TRAIN | {"loss": "l1"},
    }


def synthetic_latents(folder: Path) -> dict[str, Any]:
    """Random latents, labels and contexts, without files; a unified model under EDM."""
    return {
        "data": DATA | {"kind": "synthetic", "latent_shape": [2, 8, 8], "context_shape": [3, 8]},
        "diffusion": {"process": "edm"},
        "stages": {"boundaries": []},
        "model": LDM
        | {"decoder_channels": [8], "in_channels": 2, "out_channels": 2, "num_classes": CLASSES, "context_dim": 8},
        "optimizer": ADAMW,
        "train": TRAIN,
    }


CASES = {
    make.__name__: make for make in (discrete_images, edm_images, vp_latents, mixed_text_latents, synthetic_latents)
}
# Whose training is recorded, and on how many ranks it must come out alike. Masks of dropout differ between numbers of
# ranks by design, so `vp_latents` has one.
WORLDS = {"discrete_images": (1, 2), "edm_images": (1,), "vp_latents": (1,), "mixed_text_latents": (1,)}


def recipe_of(case: str, folder: Path) -> Recipe:
    """The recipe of a case; its shards are written below `folder`, which must not hold them yet."""
    return recipe_from({"name": case, **CASES[case](folder / case)})


def write_images(folder: Path, channels: int) -> None:
    """Shards of 8x8 PNG images with classes."""
    rng = np.random.Generator(np.random.Philox(key=1))

    def samples(first: int, count: int) -> Iterator[tuple[str, Fields]]:
        for number in range(first, first + count):
            pixels = rng.integers(0, 256, (8, 8, channels), dtype=np.uint8)
            image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
            yield f"i{number:02d}", {"png": encode_image(image), "cls": str(number % CLASSES).encode()}

    _write(folder, samples)


def write_latents(
    folder: Path,
    shape: tuple[int, int, int],
    moments: bool = False,
    tokens: tuple[int, int] | None = None,
    block: int | None = None,
    first: int = 0,
) -> None:
    """Shards of latents with classes, or with contexts [T, D] = `tokens`; packed in blocks, or a member per field."""
    rng = np.random.Generator(np.random.Philox(key=2 + first))
    stored = (2 * shape[0], *shape[1:]) if moments else shape

    def arrays(number: int) -> dict[str, np.ndarray]:
        fields = {"latent.npy": _values(rng, stored), "latent_flip.npy": _values(rng, stored)}
        return fields | ({} if tokens is None else {"context.npy": _values(rng, tokens)})

    def samples(start: int, count: int) -> Iterator[tuple[str, Fields]]:
        numbers = range(first + start, first + start + count)
        if block is None:
            for n in numbers:
                yield f"s{n:03d}", {k: _npy(v) for k, v in arrays(n).items()} | {"cls": str(n % CLASSES).encode()}
            return
        for at in range(0, count, block):
            rows = [arrays(n) for n in numbers[at : at + block]]
            tensors = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
            tensors["cls"] = torch.tensor([n % CLASSES for n in numbers[at : at + block]])
            keys = [f"b{n:03d}" for n in numbers[at : at + block]]
            yield f"{numbers[at]:08d}", {BLOCK_FIELD: pack_block(keys, tensors)}

    _write(folder, samples)


def _write(folder: Path, samples: Any, sizes: Sequence[int] = SIZES) -> None:
    folder.mkdir(parents=True)
    counts, first = {}, 0
    for shard, size in enumerate(sizes):
        name = f"{shard:05d}.tar"
        write_shard(folder / name, samples(first, size))
        counts[name], first = size, first + size
    write_index(folder, "golden", counts)


def _values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Multiples of 1/64 in [-2, 2), exact in float16."""
    return (rng.integers(-128, 128, shape) / 64).astype(np.float16)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()
