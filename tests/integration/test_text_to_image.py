"""From images with captions to an image of a prompt, by the commands of the emoji recipe's header."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdiff_dist.data.make.datasets.emoji import EMOJI_FONT

pytestmark = pytest.mark.integration


@pytest.mark.skipif(not EMOJI_FONT.exists(), reason="needs the Noto colour emoji")
def test_the_emoji_recipe_from_images_to_prompts(tmp_path: Path, msdiff) -> None:
    images, latents, run = tmp_path / "emoji", tmp_path / "latents", tmp_path / "run"
    assert msdiff("data", "prepare", "emoji", "--size", 32, "--out", images).status == 0
    recipe, out = "recipes/emoji_text2img_3stage.yaml", f"data.shards={latents}"
    encoded = msdiff("data", "encode", recipe, f"encode.data.shards={images}", "--out", latents)
    assert encoded.status == 0
    assert "[20, 64]" in encoded.output
    assert msdiff("data", "check", latents).status == 0
    few = [
        "train.steps=4",
        "optimizer.lr=0.02",
        "lr_schedule.warmup_steps=0",
        "train.global_batch_size=9",
        "preview.every=0",
        "train.precision=fp32",
    ]
    ended = msdiff("train", recipe, out, *few, "--run-dir", run)
    assert ended.status == 0, ended.output
    drawing, drawn = ["--steps", 3, "--num", 2, "--raw", "--clip"], []
    for prompts in (["red heart"], ["sun"], ["red heart", "sun"]):
        target = tmp_path / "-".join(prompts)
        options = [word for prompt in prompts for word in ("--prompt", prompt)]
        shown = msdiff("sample", run, *options, "--guidance", 4, *drawing, "--out", target)
        assert shown.status == 0, shown.output
        drawn.append([np.asarray(Image.open(target / f"0000{i}.png")) for i in range(2)])
    heart, sun, both = drawn
    assert np.array_equal(heart[0], both[0])
    assert np.array_equal(sun[1], both[1])
    assert not np.array_equal(heart[0], sun[0])

    path = latents / "00002.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    checked = msdiff("data", "check", latents)
    assert checked.status == 2
    assert "00002.tar" in checked.output
    assert "sample '" in checked.output
    other = msdiff("train", recipe, out, *few, "text_encoder.layer=last", "--run-dir", tmp_path / "other")
    assert other.status == 2
    assert "text_encoder.name" in other.output
