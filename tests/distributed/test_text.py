"""Contexts travel with their samples, and dropped ones become the embedding of the empty caption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msdiff_dist.apps.encode import encode
from msdiff_dist.data.make.shard_writer import encode_image, write_shard
from msdiff_dist.models.text_encoder import open_text_encoder
from msdiff_dist.randomness import dropped_conditions
from msdiff_dist.recipe import recipe_from
from msdiff_dist.testing import run_distributed
from tests.distributed.tiny_run import ADAM, open_run, recipe_of

pytestmark = pytest.mark.distributed

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2}


def text_recipe(folder: Path) -> dict[str, Any]:
    """A tiny run on 24 grey images, each of one value which is its caption, encoded here."""
    images = folder / "images"
    images.mkdir()
    for shard in range(6):
        samples = []
        for value in range(shard, 240, 60):
            image = Image.fromarray(np.full((8, 8), value, np.uint8))
            samples.append((f"{value:03d}", {"png": encode_image(image), "txt": str(value).encode()}))
        write_shard(images / f"{shard}.tar", samples)
    tower = folder / "routed_tower.json"
    tower.write_text(json.dumps({"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}))
    mapping = recipe_of(ADAM)
    model = mapping["model"] | {"in_channels": 1, "out_channels": 1, "num_classes": None, "context_dim": 8}
    latents = {"kind": "latent", "shards": str(folder / "out"), "lanes": 6, "latent_shape": [1, 8, 8]}
    mapping |= {
        "model": model,
        "data": latents | {"context_shape": [8, 8], "latent_dtype": "float32"},
        "encode": {"data": {"shards": str(images), "image_size": 8, "channels": 1}, "dtype": "float32"},
        "text_encoder": {"name": str(tower)},
        "train": {"steps": 9, "global_batch_size": 12, "condition_dropout": 0.5, "precision": "fp32"},
    }
    encode(recipe_from(mapping), folder / "out", nproc=1)
    return mapping


def conditions(rank: int, world_size: int, mapping: dict[str, Any], path: Path) -> tuple[float, int]:
    """The loss of one step, and how many contexts of the next two batches were dropped; each context is checked."""
    run = open_run(rank, world_size, mapping, path)
    loss = run.step(1e-3).loss
    encoder = open_text_encoder(run.recipe.text_encoder, torch.device("cpu"))
    null, dropped = encoder([""])[0][0], 0
    for _ in range(2):
        (batch,) = run.feed.next_batch()
        _, context = run.prepare.conditions(batch)
        values = ((batch.samples.x_nCHW[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        mask_n = dropped_conditions(0, batch.batch, batch.samples.index_n, 0.5).tolist()
        own, _ = encoder([str(value) for value in values])
        for row, is_dropped in enumerate(mask_n):
            assert torch.allclose(context[row], null if is_dropped else own[row], atol=1e-5)
        dropped += sum(mask_n)
    run.feed.close()
    return loss, dropped


def test_contexts_are_routed_with_their_samples_and_dropped_by_number(tmp_path: Path) -> None:
    mapping = text_recipe(tmp_path)
    ((loss, dropped),) = run_distributed(conditions, 1, 1, mapping, tmp_path / "1")
    assert 4 < dropped < 20
    results = run_distributed(conditions, 2, 2, mapping, tmp_path / "2")
    assert sum(n for _, n in results) == dropped
    assert [other for other, _ in results] == pytest.approx([loss, loss], rel=1e-5)
