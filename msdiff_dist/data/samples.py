"""Raw bytes of a sample to arrays."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.stream import RawSample
from msdiff_dist.errors import DataError
from msdiff_dist.randomness import generator

IMAGE_FIELDS = ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "pgm")
Array = NDArray[Any]


@dataclass(frozen=True)
class Sample:
    """One decoded sample: x_CHW (uint8 picture or floating latent) and what the configuration asks for besides."""

    key: str
    x_CHW: Array
    label: int | None = None
    caption: str | None = None
    context_TC: Array | None = None


def to_model_range(x: Tensor) -> Tensor:
    """uint8 pictures to float32 in [-1, 1]; latents to float32, unchanged."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()


def decode(raw: RawSample, config: DataConfig, seed: int, g: int) -> Sample:
    """Decode a raw sample that is number g of the run.

    Raises:
        DataError: a field that is missing, damaged or of the wrong size; names shard, key and field.
    """
    if config.kind == "image":
        x_CHW = _picture(raw, config)
        if config.flip and generator(seed, "flip", g).random() < 0.5:
            x_CHW = x_CHW[:, :, ::-1]
    else:
        x_CHW = _latent(raw, config, seed, g)
    context_TC = None
    if config.context_shape is not None:
        context_TC = _array(raw, config.context_field, config.context_shape, "data.context_shape", config.latent_dtype)
    caption = _field(raw, "txt").decode("utf-8", "replace").strip() if config.captions else None
    return Sample(raw["__key__"], x_CHW, _label(raw, config), caption, context_TC)


def synthesize(config: DataConfig, seed: int, g: int) -> Sample:
    """Sample number g of kind `synthetic`: standard normal latent and context, uniform label."""
    rng = generator(seed, "synthetic sample", g)
    x_CHW = rng.standard_normal(config.x_shape, dtype=np.float32).astype(config.latent_dtype)
    label = None if config.num_classes is None else int(rng.integers(config.num_classes))
    context_TC = None
    if config.context_shape is not None:
        context_TC = rng.standard_normal(config.context_shape, dtype=np.float32).astype(config.latent_dtype)
    return Sample(f"synthetic-{g}", x_CHW, label, None, context_TC)


def _picture(raw: RawSample, config: DataConfig) -> Array:
    field = next((name for name in IMAGE_FIELDS if name in raw), "png")
    data = _field(raw, field)
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = "L" if config.channels == 1 else "RGB"
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise _bad(raw, field, f"is not a readable picture ({e})", "Make the shard again without it.") from e
    height, width = pixels.shape[:2]
    if (height, width) != (config.image_size, config.image_size):
        remedy = f"Make shards of that size (`msdiff data pack --size {config.image_size}`)"
        if height == width:
            remedy = f"Set data.image_size to {height}, or m{remedy[1:]}"
        problem = f"the picture of sample {raw['__key__']!r} in {raw['__url__']} is {width}x{height} pixels"
        raise DataError("data.image_size", config.image_size, problem, remedy + ".")
    return pixels[None] if config.channels == 1 else np.moveaxis(pixels, -1, 0)


def _latent(raw: RawSample, config: DataConfig, seed: int, g: int) -> Array:
    C, H, W = config.x_shape
    if not config.latent_moments:
        return _array(raw, config.latent_field, (C, H, W), "data.latent_shape", config.latent_dtype)
    moments = _array(raw, config.latent_field, (2 * C, H, W), "data.latent_shape", "float32")
    mean, log_variance = moments[:C], moments[C:]
    noise = generator(seed, "posterior", g).standard_normal((C, H, W), dtype=np.float32)
    return (mean + np.exp(log_variance / 2) * noise).astype(config.latent_dtype)


def _array(raw: RawSample, field: str, shape: tuple[int, ...], setting: str, dtype: str) -> Array:
    try:
        array = np.load(io.BytesIO(_field(raw, field)), allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
        raise _bad(raw, field, f"is not a readable .npy array ({e})", "Make the shard again.") from e
    if array.shape != shape or array.dtype.kind != "f":
        problem = f"{field!r} of sample {raw['__key__']!r} in {raw['__url__']} is {array.dtype}{list(array.shape)}"
        raise DataError(setting, list(shape), f"{problem}, not float{list(shape)}", f"Correct {setting} or the shards.")
    return array.astype(dtype, copy=False)


def _label(raw: RawSample, config: DataConfig) -> int | None:
    if config.num_classes is None:
        return None
    text = _field(raw, "cls")
    try:
        label = int(text)
    except ValueError:
        label = -1
    if not 0 <= label < config.num_classes:
        problem = f"sample {raw['__key__']!r} in {raw['__url__']} has class {text[:20].decode('utf-8', 'replace')!r}"
        raise DataError("data.num_classes", config.num_classes, problem, "Set data.num_classes above every label.")
    return label


def _field(raw: RawSample, field: str) -> bytes:
    if field not in raw:
        present = ", ".join(sorted(name for name in raw if not name.startswith("__")))
        raise _bad(raw, field, f"is missing (the sample has: {present})", "Use shards that have it.")
    return raw[field]


def _bad(raw: RawSample, field: str, problem: str, remedy: str) -> DataError:
    return DataError("data.shards", raw["__url__"], f"field {field!r} of sample {raw['__key__']!r} {problem}", remedy)
