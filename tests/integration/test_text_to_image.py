"""From images with captions to an image of a prompt, by the commands of the emoji recipe's header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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

    _check_retrieval(run, images, tmp_path, msdiff)

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


def _check_retrieval(run: Path, images: Path, folder: Path, msdiff: Any) -> None:
    """Scores by a CLIP of random weights are those that its towers have when called one image and prompt at a time."""
    import open_clip

    towers = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    named, weights = folder / "random_clip.json", folder / "random_clip.pt"
    named.write_text(json.dumps(towers))
    open_clip.add_model_config(named)
    torch.manual_seed(0)
    net: Any = open_clip.create_model("random_clip").eval()
    torch.save(net.state_dict(), weights)
    num, sampled = 12, folder / "evaluated"
    clip = ["--features", "clip", "--clip-model", named, "--feature-weights", weights, "--metrics", "clip"]
    scored = msdiff(
        "evaluate", run, *clip, "--reference", images, "--num", num, "--steps", 3, "--clip", "--guidance", 4,
        "--samples", sampled, "--json", folder / "scores.json",
    )  # fmt: skip
    assert scored.status == 0, scored.output
    prompts = json.loads((sampled / "sampling.json").read_text())["prompts"]
    assert len(set(prompts)) == num
    mean, std = (torch.tensor(x)[:, None, None] for x in (net.visual.image_mean, net.visual.image_std))
    tokens = open_clip.get_tokenizer("random_clip")
    with torch.no_grad():
        text = torch.cat([net.encode_text(tokens([prompt]), normalize=True) for prompt in prompts])
        seen = [np.array(Image.open(sampled / f"{i:05d}.png")) for i in range(num)]
        pixels = [((torch.from_numpy(x).permute(2, 0, 1) / 255 - mean) / std)[None] for x in seen]
        likeness = torch.cat([net.encode_image(x, normalize=True) for x in pixels]) @ text.T
    found = json.loads((folder / "scores.json").read_text())["metrics"]
    assert found["retrieval"] == (likeness.argmax(1) == torch.arange(num)).double().mean()
    assert found["clip"] == pytest.approx(100 * likeness.diagonal().clamp(min=0).mean().item(), rel=1e-5)
