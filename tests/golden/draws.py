"""Random draws outside training: sampling, preparing and encoding data, dividing time into stages.

All are draws of numpy, which are the same on every CPU, and are recorded exactly, as numbers or by digest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.index import read_index, resolve_shards
from msdiff_dist.data.make.datasets.digits import digits
from msdiff_dist.data.make.encoding import EncodeConfig, Networks, ShardEncoder
from msdiff_dist.data.make.pack import pack
from msdiff_dist.data.portion import Portion
from msdiff_dist.data.tar_members import chunks
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig, DiscreteProcess
from msdiff_dist.diffusion.processes.vp import VPConfig, VPProcess
from msdiff_dist.diffusion.sampling import image_generators
from msdiff_dist.evaluation.held_out_loss import evaluations
from msdiff_dist.evaluation.scores import bootstrap_draw, mind_directions
from msdiff_dist.randomness import crop_position, held_out_noise, stage_uniform
from msdiff_dist.stage_division.optimal_denoiser import draw_samples, limit_similarities
from tests.golden.batches import digest
from tests.golden.cases import write_images

SEED = 5


def draws_record(folder: Path) -> dict[str, Any]:
    """The draws by purpose (see `randomness.generator`)."""
    encoded = _encoded(folder)
    return {
        "sampling": [g.initial_seed() for g in image_generators(SEED, [0, 1, 9])],
        "test split": " ".join(image.key for image in list(digits(None, "test", 8))[:20]),
        "pack order": _packed(folder),
        "crop": [list(crop_position(SEED, g)) for g in (0, 1, 9)],
        "encode": digest(encoded["latent.npy"]),
        "encode flipped": digest(encoded["latent_flip.npy"]),
        "bootstrap": bootstrap_draw(SEED, 1, 100, 12).tolist(),
        **_held_out(),
        "stage of batch": [stage_uniform(SEED, batch) for batch in (0, 1, 9)],
        "mind directions": mind_directions(3)[:, 0].tolist(),
        **_divided(),
    }


def _held_out() -> dict[str, Any]:
    """Which samples are held out, and what is drawn for the evaluations of their loss."""
    process = DiscreteProcess(DiscreteConfig())
    found = evaluations(process, 50, 64, SEED)
    return {
        "held out": np.flatnonzero(Portion(0.3, True).of("00001.tar", 40)).tolist(),
        "held out samples": found.sample_n[:16].tolist(),
        "held out times": found.t_n[::4].tolist(),
        "held out noise": digest(held_out_noise(SEED, np.array([0, 7]), (3, 2)).numpy()),
    }


def _packed(folder: Path) -> str:
    """The order in which twelve images are packed."""
    (folder / "to-pack").mkdir()
    for number in range(12):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(folder / f"to-pack/{number:02d}.png")
    pack(folder / "to-pack", folder / "packed")
    about = [about for chunk in chunks(str(folder / "packed/00000.tar")) for about in chunk["json"]]
    return " ".join(json.loads(text)["source"].removesuffix(".png") for text in about)


def _encoded(folder: Path) -> dict[str, np.ndarray]:
    """Posterior samples of a shard of images. The posterior has variance one, so that no exponential is rounded."""

    def encode(images: Tensor) -> Tensor:
        mean = images.float() / 128
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)

    write_images(folder / "to-encode", channels=1)
    shard = read_index(resolve_shards(str(folder / "to-encode")))[1]
    source = DataConfig(shards=str(folder / "to-encode"), image_size=8, channels=1)
    config = EncodeConfig(flip=True, dtype="float32", seed=SEED)
    ShardEncoder(config, source, Networks(encode, True, None))(1, shard, "", folder / "encoded.tar")
    (chunk,) = chunks(str(folder / "encoded.tar"))
    return chunk


def _divided() -> dict[str, Any]:
    """What Algorithm 1 draws: samples, their noises and times."""
    data = torch.arange(24, dtype=torch.float64).reshape(12, 2)

    def blocks() -> list[tuple[int, Tensor]]:
        return [(0, data)]

    draws = draw_samples(blocks, len(data), 16, SEED)
    similarities = limit_similarities(VPProcess(VPConfig()), blocks, draws, 0.1, SEED)
    return {
        "optimal denoiser": [digest(draws.sample_Md), digest(draws.noise_Md)],
        "optimal denoiser times": digest(similarities.clock_M),
    }
