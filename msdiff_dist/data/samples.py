"""Raw bytes of a sample to arrays."""

from __future__ import annotations

import functools
import io
from typing import Any, NamedTuple

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
_FLIPS = 1024  # drawn at once
_DTYPES = {"float16": np.dtype("float16"), "float32": np.dtype("float32"), "bfloat16": np.dtype("uint16")}


class Sample(NamedTuple):
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
    flipped = config.flip and bool(_flips(seed, g // _FLIPS)[g % _FLIPS])
    if config.kind == "image":
        x_CHW = _picture(raw, config)
        if flipped:
            x_CHW = x_CHW[:, :, ::-1]
    else:
        x_CHW = _latent(raw, config, flipped, seed, g)
    context_TC = None
    if config.context_shape is not None:
        context_TC = _array(raw, config.context_field, config.context_shape, "data.context_shape", config.latent_dtype)
    caption = _field(raw, "txt").decode("utf-8", "replace").strip() if config.captions else None
    return Sample(raw["__key__"], x_CHW, _label(raw, config), caption, context_TC)


@functools.lru_cache(maxsize=64)
def _flips(seed: int, number: int) -> NDArray[np.bool_]:
    return generator(seed, "flip", number).random(_FLIPS) < 0.5


def synthesize(config: DataConfig, seed: int, g: int) -> Sample:
    """Sample number g of kind `synthetic`: standard normal latent and context, uniform label."""
    rng = generator(seed, "synthetic sample", g)
    x_CHW = to_dtype(rng.standard_normal(config.x_shape, dtype=np.float32), config.latent_dtype)
    label = None if config.num_classes is None else int(rng.integers(config.num_classes))
    context_TC = None
    if config.context_shape is not None:
        context_TC = to_dtype(rng.standard_normal(config.context_shape, dtype=np.float32), config.latent_dtype)
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


def _latent(raw: RawSample, config: DataConfig, flipped: bool, seed: int, g: int) -> Array:
    C, H, W = config.x_shape
    field = config.latent_field
    if flipped:
        stem, dot, extension = field.rpartition(".")
        field = f"{stem}_flip{dot}{extension}"
        if field not in raw:
            raise DataError(
                "data.flip", True, f"shard {raw['__url__']} has no {field}: a mirrored latent is not the latent of a "
                "mirrored picture", "Remove data.flip, or encode the pictures with encode.flip: true.",
            )  # fmt: skip
    if not config.latent_moments:
        return _array(raw, field, (C, H, W), "data.latent_shape", config.latent_dtype)
    moments = _array(raw, field, (2 * C, H, W), "data.latent_shape", "float32")
    mean, log_variance = moments[:C], moments[C:]
    noise = generator(seed, "posterior", g).standard_normal((C, H, W), dtype=np.float32)
    return to_dtype(mean + np.exp(log_variance / 2) * noise, config.latent_dtype)


def to_dtype(array: Array, dtype: str) -> Array:
    """A floating array, bfloat16 as uint16 of the same bits, in another floating type."""
    if array.dtype == _DTYPES[dtype]:
        return array
    if dtype == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16).view(torch.uint16).numpy()
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype)


def _array(raw: RawSample, field: str, shape: tuple[int, ...], setting: str, dtype: str) -> Array:
    content, types = _field(raw, field), "efdH"  # packed bfloat16 comes as uint16
    if isinstance(content, bytes):
        types = "efd"
        try:
            content = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, OSError, EOFError) as e:
            raise _bad(raw, field, f"is not a readable .npy array ({e})", "Make the shard again.") from e
    if content.shape != shape or content.dtype.char not in types:
        problem = f"{field!r} of sample {raw['__key__']!r} in {raw['__url__']} is {content.dtype}{list(content.shape)}"
        raise DataError(setting, list(shape), f"{problem}, not float{list(shape)}", f"Correct {setting} or the shards.")
    return to_dtype(content, dtype)


def _label(raw: RawSample, config: DataConfig) -> int | None:
    if config.num_classes is None:
        return None
    text = _field(raw, "cls")
    try:
        label = int(text)
    except ValueError:
        label = -1
    if not 0 <= label < config.num_classes:
        shown = text[:20].decode("utf-8", "replace") if isinstance(text, bytes) else int(text)
        problem = f"sample {raw['__key__']!r} in {raw['__url__']} has class {shown!r}"
        raise DataError("data.num_classes", config.num_classes, problem, "Set data.num_classes above every label.")
    return label


def _field(raw: RawSample, field: str) -> Any:
    if field not in raw:
        present = ", ".join(sorted(name for name in raw if not name.startswith("__")))
        raise _bad(raw, field, f"is missing (the sample has: {present})", "Use shards that have it.")
    return raw[field]


def _bad(raw: RawSample, field: str, problem: str, remedy: str) -> DataError:
    return DataError("data.shards", raw["__url__"], f"field {field!r} of sample {raw['__key__']!r} {problem}", remedy)
