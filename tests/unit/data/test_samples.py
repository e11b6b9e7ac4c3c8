"""Decoding samples, and the messages about bad ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.latent_blocks import Chunk, objects
from msdiff_dist.data.samples import Samples, decode, synthesize
from msdiff_dist.errors import DataError

RGB = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, "png")
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def raw(**fields: bytes) -> Chunk:
    named = {"__key__": "k7", "__url__": "a/3.tar", **{name.replace("__", "."): data for name, data in fields.items()}}
    return {name: objects([value]) for name, value in named.items()}


def decode_one(chunk: Chunk, config: DataConfig, g: int = 0) -> Samples:
    return decode(chunk, config, 0, np.array([g]))


def images(**fields) -> DataConfig:
    return DataConfig(shards="x", image_size=4, **fields)


def latents(**fields) -> DataConfig:
    return DataConfig(shards="x", kind="latent", latent_shape=(2, 3, 3), **fields)


def test_images_keep_every_pixel():
    x_CHW = decode_one(raw(png=png(RGB)), images(), 0).x_nCHW[0]
    assert x_CHW.dtype == np.uint8
    assert (x_CHW == RGB.transpose(2, 0, 1)).all()
    grey = RGB[..., 0]
    assert (decode_one(raw(png=png(grey)), images(channels=1), 0).x_nCHW[0] == grey[None]).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1"])
def test_images_of_any_mode_become_what_channels_says(mode):
    data = png(RGB, mode)
    assert decode_one(raw(png=data), images(), 0).x_nCHW[0].shape == (3, 4, 4)
    assert decode_one(raw(png=data), images(channels=1), 0).x_nCHW[0].shape == (1, 4, 4)


def test_flip_mirrors_about_half_and_depends_on_seed_and_number_only():
    sample = raw(png=png(RGB))
    straight = RGB.transpose(2, 0, 1)
    flipped = []
    for g in range(200):
        x_CHW = decode_one(sample, images(flip=True), g).x_nCHW[0]
        flipped.append((x_CHW == straight[:, :, ::-1]).all())
        assert flipped[-1] or (x_CHW == straight).all()
        assert (x_CHW == decode_one(sample, images(flip=True), g).x_nCHW[0]).all()
    assert 70 < sum(flipped) < 130


def test_latents_labels_captions_contexts():
    latent = np.random.default_rng(0).standard_normal((2, 3, 3)).astype(np.float16)
    context = np.ones((5, 4), np.float32)
    fields = raw(latent__npy=npy(latent), context__npy=npy(context), cls=b"3\n", txt="à b\n".encode())
    sample = decode_one(fields, latents(num_classes=4, captions=True, context_shape=(5, 4)), 0)
    assert (sample.x_nCHW[0] == latent).all()
    assert (sample.label_n, sample.caption_n, sample.key_n) == ([3], ["à b"], ["k7"])
    assert sample.context_nTC is not None
    assert sample.context_nTC.dtype == np.float16
    assert (sample.context_nTC == 1).all()
    plain = decode_one(fields, latents(), 0)
    assert (plain.label_n, plain.caption_n, plain.context_nTC) == (None, None, None)


def test_moments_are_sampled_anew_at_each_visit_with_their_mean_and_deviation():
    mean, deviation = np.full((2, 3, 3), 3.0, np.float32), 0.5
    moments = np.concatenate([mean, np.full_like(mean, 2 * np.log(deviation))])
    config = latents(latent_moments=True, latent_dtype="float32")
    draws = np.stack([decode_one(raw(latent__npy=npy(moments)), config, g).x_nCHW[0] for g in range(400)])
    assert draws.mean() == pytest.approx(3.0, abs=0.03)
    assert draws.std() == pytest.approx(deviation, abs=0.02)
    again = decode_one(raw(latent__npy=npy(moments)), config, 7).x_nCHW[0]
    assert (again == draws[7]).all()


@pytest.mark.parametrize(
    ("fields", "config", "words"),
    [
        ({"txt": b"x"}, images(), ["data.shards", "a/3.tar", "k7", "'png'", "is missing", "has: txt"]),
        ({"png": b"junk"}, images(), ["a/3.tar", "k7", "'png'", "not a readable image"]),
        ({"png": png(RGB)[:60]}, images(), ["a/3.tar", "k7", "'png'", "not a readable image"]),
        ({"png": png(RGB[:2, :2])}, images(), ["data.image_size = 4", "a/3.tar", "k7", "2x2", "data.image_size to 2"]),
        ({"png": png(RGB[:2])}, images(), ["data.image_size = 4", "4x2", "--size 4"]),
        ({"png": png(RGB)}, images(num_classes=3), ["a/3.tar", "k7", "'cls'", "is missing"]),
        ({"png": png(RGB), "cls": b"3"}, images(num_classes=3), ["data.num_classes = 3", "a/3.tar", "k7", "'3'"]),
        ({"png": png(RGB), "cls": b"dog"}, images(num_classes=3), ["data.num_classes", "k7", "'dog'"]),
        ({"png": png(RGB)}, images(captions=True), ["k7", "'txt'", "is missing"]),
        ({"png": b""}, latents(), ["k7", "'latent.npy'", "is missing", "has: png"]),
        ({"latent__npy": b"junk"}, latents(), ["k7", "'latent.npy'", "not a readable .npy"]),
        ({"latent__npy": npy(np.zeros((4, 3, 3), "f4"))}, latents(), ["data.latent_shape", "k7", "float32[4, 3, 3]"]),
        ({"latent__npy": npy(np.zeros((2, 3, 3), "i4"))}, latents(), ["data.latent_shape", "int32"]),
        ({"latent__npy": npy(np.array([{}]))}, latents(), ["'latent.npy'", "not a readable .npy"]),
    ],
)
def test_bad_samples_are_named(fields, config, words):
    with pytest.raises(DataError) as caught:
        decode_one(raw(**fields), config, 0)
    for word in words:
        assert word in str(caught.value)


def test_synthetic_samples_depend_on_seed_and_number_only():
    config = DataConfig(kind="synthetic", latent_shape=(3, 8, 8), num_classes=5, context_shape=(2, 4))
    every = synthesize(config, 1, np.arange(100))
    assert every.x_nCHW.shape == (100, 3, 8, 8)
    assert every.x_nCHW.dtype == np.float16
    again = synthesize(config, 1, np.array([9]))
    assert (again.x_nCHW[0] == every.x_nCHW[9]).all()
    assert (again.x_nCHW[0] != every.x_nCHW[10]).any()
    assert every.context_nTC is not None
    assert every.context_nTC.shape == (100, 2, 4)
    assert set(every.label_n) == set(range(5))


def test_images_of_other_sizes_are_made_to_fit():
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, :4] = 255
    sample = raw(png=png(wide))
    centre = decode_one(sample, images(resize="cover"), 0).x_nCHW[0]
    assert (centre == 0).all()
    assert decode_one(sample, images(resize="pad"), 0).x_nCHW[0].shape == (3, 4, 4)
    means = [decode_one(sample, images(resize="cover", crop="random"), g).x_nCHW[0].mean() for g in range(40)]
    assert min(means) == 0
    assert max(means) > 200
    again = [decode_one(sample, images(resize="cover", crop="random"), g).x_nCHW[0].mean() for g in range(40)]
    assert means == again


def test_orientation_and_transparency_are_those_of_the_recipe():
    clear = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(clear, "png")
    assert (decode_one(raw(png=clear.getvalue()), images(), 0).x_nCHW == 255).all()
    assert (decode_one(raw(png=clear.getvalue()), images(transparency="black"), 0).x_nCHW == 0).all()
    with pytest.raises(DataError, match=r"k7.*transparent pixels"):
        decode_one(raw(png=clear.getvalue()), images(transparency="refuse"), 0)
