"""Encoding images to latents: what is stored, resuming, parts, corruption, and that training notices a wrong folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from omegaconf import OmegaConf
from PIL import Image

from msdiff_dist.apps.encode import encode
from msdiff_dist.apps.train.found_data import find_data
from msdiff_dist.apps.train.latent_checks import check_latents
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.data.make.check import check_folder
from msdiff_dist.data.make.shard_writer import encode_image, write_index, write_shard
from msdiff_dist.data.tar_members import samples
from msdiff_dist.errors import ConfigError, DataError, UserError
from msdiff_dist.files.work_share import Part, working
from msdiff_dist.models.text_encoder import open_text_encoder
from msdiff_dist.recipe import recipe_from, recipe_mapping

SIZE = 8
TOWER = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
}


@pytest.fixture
def images(tmp_path):
    """Three shards of 5 images with captions and labels."""
    rng, folder, counts = np.random.default_rng(0), tmp_path / "images", {}
    folder.mkdir()
    for shard in range(3):
        content = []
        for i in range(5):
            image = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
            fields = {"png": encode_image(image), "cls": str(i).encode(), "txt": f"image {i}".encode()}
            content.append((f"{shard}-{i}", fields))
        write_shard(folder / f"{shard}.tar", content)
        counts[f"{shard}.tar"] = 5
    write_index(folder, "images", counts)
    return folder


def recipe_of(images: Path, autoencoder=None, text=None, data=None, **encode_fields):
    """A recipe that encodes `images`, or trains on latents if `data` is given."""
    channels = {"space_to_depth": 12}.get((autoencoder or {}).get("kind"), 3)
    channels = data["latent_shape"][0] if data else channels
    images = {"shards": str(images), "image_size": SIZE, "num_classes": 5, "lanes": 1}
    context = {"context_dim": 8} if data and data.get("context_shape") else {}
    return recipe_from({
        "name": "t", "data": data or images, "autoencoder": autoencoder or {}, "text_encoder": text,
        "encode": {"block": 2, "batch_size": 2, "data": images, **encode_fields}, "optimizer": {"lr": 1e-3},
        "stages": {"boundaries": [442], "sampling": "equal"}, "train": {"steps": 1, "global_batch_size": 4},
        "model": {
            "in_channels": channels, "out_channels": channels, "encoder_channels": 8, "decoder_channels": [8, 8],
            "channel_mult": [1], "num_res_blocks": 1, "attention_downsamples": [1], "num_heads": 2, "norm_groups": 4,
            "num_classes": 5, **context,
        },
    })  # fmt: skip


def latent_data(folder: Path, shape, **fields):
    return {
        "kind": "latent",
        "shards": str(folder),
        "latent_shape": list(shape),
        "num_classes": 5,
        "lanes": 1,
        **fields,
    }


def images_of(folder: Path):
    config = DataConfig(shards=str(folder), image_size=SIZE, num_classes=5, lanes=1, shuffle=1)
    step = next(StepLoader(config, 0, 15))
    return dict(zip(step.keys, step.x_nCHW.float() / 127.5 - 1, strict=True))


@pytest.mark.parametrize("kind", ["pixel", "space_to_depth"])
def test_lossless_latents_train_as_the_images_would(images, tmp_path, kind):
    autoencoder = {"kind": kind, **({"factor": 2} if kind == "space_to_depth" else {})}
    recipe = recipe_of(images, autoencoder, flip=True, dtype="float32", measure_scale=True)
    manifest = encode(recipe, tmp_path / "out", nproc=1)
    assert check_folder(tmp_path / "out") == manifest.samples == 15
    expected = images_of(images)
    if kind == "space_to_depth":
        expected = {k: torch.nn.functional.pixel_unshuffle(x, 2) for k, x in expected.items()}
    read = [s for i in range(3) for s in samples(str(tmp_path / f"out/{i:05d}.tar"))]
    assert [s["__key__"] for s in read] == [f"{s}-{i}" for s in range(3) for i in range(5)]
    for sample in read:
        assert np.array_equal(sample["latent.npy"], expected[sample["__key__"]].numpy())
        assert sample["cls"] == int(sample["__key__"][-1])
        if kind == "pixel":
            assert np.array_equal(sample["latent_flip.npy"], sample["latent.npy"][..., ::-1])
    every = torch.stack(list(expected.values())).double()
    assert manifest.scale_factor == pytest.approx(1 / every.std(correction=0).item(), rel=1e-5)


def test_moments_and_embeddings_are_the_networks_own(images, tmp_path):
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2).eval()
    model.save_pretrained(tmp_path / "kl")
    (tmp_path / "encode_tower.json").write_text(json.dumps(TOWER))
    autoencoder, text = {"kind": "kl", "path": str(tmp_path / "kl")}, {"name": str(tmp_path / "encode_tower.json")}
    data = latent_data(tmp_path / "out", (2, 8, 8), latent_moments=True, context_shape=[8, 8], flip=True)
    recipe = recipe_of(images, autoencoder, text, data, store="moments", dtype="bfloat16", flip=True)
    manifest = encode(recipe, tmp_path / "out", nproc=1)
    assert check_folder(tmp_path / "out") == 15
    assert (manifest.shape, manifest.context_shape, manifest.moments) == ((2, 8, 8), (8, 8), True)
    trained = recipe_of(images, autoencoder, text, data)
    null = check_latents(trained, find_data(trained.data).manifests)
    context, _ = open_text_encoder(recipe.text_encoder, torch.device("cpu"))(["", "image 3"])
    assert torch.equal(null, context[0].bfloat16())
    step = next(StepLoader(trained.data, 0, 15))
    assert torch.allclose(step.context_nTC[step.keys.index("1-3")].float(), context[1], atol=0.05)
    sample = next(samples(str(tmp_path / "out/00000.tar")))
    posterior = model.encode(images_of(images)["0-0"][None]).latent_dist
    moments = torch.cat([posterior.mean, posterior.logvar], dim=1)[0].bfloat16()
    stored = torch.from_numpy(sample["latent.npy"].copy()).view(torch.bfloat16)
    assert torch.allclose(stored.float(), moments.float(), rtol=0.02, atol=1e-2)
    drawn = encode(recipe_of(images, autoencoder, text, data), tmp_path / "drawn", nproc=1)
    assert (drawn.shape, drawn.moments) == ((2, 8, 8), False)

    for change, field in (
        ({"autoencoder": {**autoencoder, "scale_factor": 0.5}}, "autoencoder.scale_factor"),
        ({"data": {**data, "latent_moments": False}}, "data.latent_moments"),
        ({"data": {**data, "context_shape": [7, 8]}}, "data.context_shape"),
        ({"text_encoder": {**text, "layer": "last"}}, "text_encoder.name"),
        ({"autoencoder": {"kind": "pixel"}}, "autoencoder.kind"),
    ):
        other = recipe_from({**recipe_mapping(trained), **change})
        with pytest.raises(UserError, match=r"manifest|made by") as caught:
            check_latents(other, find_data(other.data).manifests)
        assert caught.value.field == field
    other = recipe_of(images, autoencoder, text, {**data, "latent_shape": [3, 8, 8]})
    with pytest.raises(DataError, match=r"data\.latent_shape.*manifest"):
        check_latents(other, find_data(other.data).manifests)


START = """
import sys
from pathlib import Path
from msdiff_dist.apps.encode import encode
from msdiff_dist.recipe import load_recipe
if __name__ == "__main__":
    encode(load_recipe(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
"""


def test_a_killed_encoding_resumes_and_any_number_of_processes_gives_the_same(images, tmp_path):
    recipe = recipe_of(images, {"kind": "space_to_depth", "factor": 2})
    whole, out = tmp_path / "whole", tmp_path / "out"
    reference = encode(recipe, whole, nproc=1)
    (tmp_path / "recipe.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(recipe_mapping(recipe))))
    (tmp_path / "start.py").write_text(START)
    command = [sys.executable, str(tmp_path / "start.py"), str(tmp_path / "recipe.yaml"), str(out), "2"]
    process = subprocess.Popen(command, start_new_session=True)
    while process.poll() is None and not list(out.glob(".encode/0*.json")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not (out / "manifest.json").exists():
        with pytest.raises(DataError, match="not encoded to its end"):
            check_folder(out)
        trained = recipe_of(images, {}, None, latent_data(out, (12, 4, 4)))
        with pytest.raises(DataError, match="not encoded to its end"):
            check_latents(trained, find_data(trained.data).manifests)
    done = {
        path: path.stat().st_mtime_ns for path in out.glob("0*.tar") if (out / f".encode/{path.stem}.json").exists()
    }
    assert done
    (out / ".00002.tar.0123abcd.partial").write_bytes(b"half")
    assert encode(recipe, out, nproc=1) == reference
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not list(out.glob(".*.partial"))
    for path in filter(Path.is_file, whole.iterdir()):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_parts_fill_one_folder_and_measure_the_scale_of_the_whole(images, tmp_path):
    recipe = recipe_of(images, measure_scale=True)
    whole, out = tmp_path / "whole", tmp_path / "out"
    reference = encode(recipe, whole, 1)
    assert encode(recipe, out, 1, Part(1, 2)) is None
    assert sorted(path.name for path in out.glob("0*.tar")) == ["00001.tar"]
    with pytest.raises(DataError, match="not encoded to its end"):
        check_folder(out)
    with working(out / ".encode", Part(1, 2)):
        for other in (Part(1, 2), Part(), Part(0, 3)):
            with pytest.raises(DataError, match="being filled by another process"):
                encode(recipe, out, 1, other)
        assert encode(recipe, out, 1, Part(0, 2)) == reference
    assert {p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()} == {
        p.name: p.read_bytes() for p in out.iterdir() if p.is_file()
    }
    with pytest.raises(ConfigError, match=r"--part.*0 to 1"):
        Part(2, 2)


def test_corrupt_images_are_left_out_up_to_the_limit(images, tmp_path):
    data = bytearray((images / "1.tar").read_bytes())
    data[512:530] = bytes(18)
    (images / "1.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"1\.tar.*not a readable image"):
        encode(recipe_of(images), tmp_path / "out", nproc=1)
    source = {"shards": str(images), "image_size": SIZE, "max_bad": 1}
    recipe = recipe_from({**recipe_mapping(recipe_of(images)), "encode": {"block": 2, "data": source}})
    manifest = encode(recipe, tmp_path / "bad", nproc=1)
    assert (manifest.samples, len(manifest.left_out)) == (14, 1)
    assert "'1-0'" in manifest.left_out[0]
    assert check_folder(tmp_path / "bad") == 14


@pytest.mark.parametrize("harm", ["bit", "cut", "gone", "extra", "manifest"])
def test_check_names_the_first_corruption(images, tmp_path, harm):
    out = tmp_path / "out"
    encode(recipe_of(images, dtype="float32"), out, nproc=1)
    path, message = out / "00001.tar", r"00001\.tar"
    data = bytearray(path.read_bytes())
    if harm == "bit":
        at = data.index(images_of(images)["1-3"].numpy().tobytes())
        data[at + 5] ^= 4
        path.write_bytes(data)
        message = r"00001\.tar.*sample '1-3' \(number 3\) is corrupt"
    elif harm == "cut":
        path.write_bytes(data[: len(data) // 2])
        message = r"00001\.tar.*is corrupt after sample '1-\d'"
    elif harm == "gone":
        path.unlink()
    elif harm == "extra":
        (out / "00007.tar").write_bytes(data)
        message = r"00007\.tar.*not in the manifest"
    else:
        (out / "manifest.json").write_text("{}")
        message = r"manifest\.json.*is not a manifest"
    with pytest.raises(DataError, match=message):
        check_folder(out)


def test_what_cannot_be_encoded_is_refused(images, tmp_path):
    with pytest.raises(ConfigError, match=r"encode\.store.*no posterior"):
        encode(recipe_of(images, store="moments"), tmp_path / "out", 1)
    encode(recipe_of(images), tmp_path / "out", 1)
    with pytest.raises(DataError, match=r"made otherwise \(encode\.dtype was"):
        encode(recipe_of(images, dtype="float32"), tmp_path / "out", 1)
    with pytest.raises(DataError, match="holds something else"):
        encode(recipe_of(images), images, 1)
    assert check_folder(images) == 15
