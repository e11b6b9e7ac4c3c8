"""Decoding: from the file contents or block columns of a chunk to arrays, as the recipe's `data` asks for them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.image_files import IMAGE_FIELDS, UNREADABLE, fitted, read_image
from msdiff_dist.data.latent_blocks import Chunk, objects
from msdiff_dist.data.npy import read_npy
from msdiff_dist.data.order import Ints
from msdiff_dist.errors import DataError
from msdiff_dist.randomness import crop_position, flips, generator, posterior_noise

Array = NDArray[Any]
_DIGITS = re.compile(rb"\s*\+?[0-9]{1,18}\s*")
_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("float16"),
    "float32": np.dtype("float32"),
    "bfloat16": np.dtype("uint16"),
}


class Samples(NamedTuple):
    """n decoded samples. Columns that the configuration does not ask for are None.

    x_nCHW holds uint8 images or floating latents; keys and captions are columns of strings. bfloat16, which numpy
    lacks, is uint16 of the same bits.
    """

    key_n: Array
    x_nCHW: Array
    label_n: Ints | None = None
    caption_n: Array | None = None
    context_nTC: Array | None = None


def decode(chunk: Chunk, config: DataConfig, seed: int, g_n: Ints) -> Samples:
    """Decode n samples, whose global sample numbers g_n decide mirroring, cropping and posterior noise.

    Raises:
        DataError: a field is missing, corrupt or of the wrong size; names shard, key and field.
    """
    flipped_n = flips(seed, g_n) if config.flip else np.zeros(len(g_n), np.bool_)
    if config.kind == "image":
        at = [crop_position(seed, g) for g in g_n.tolist()] if config.crop == "random" else [(0.5, 0.5)] * len(g_n)
        x_nCHW = np.stack([_image(chunk, row, config, at[row]) for row in range(len(g_n))])
        x_nCHW[flipped_n] = x_nCHW[flipped_n][..., ::-1]
    else:
        x_nCHW = _latents(chunk, config, flipped_n, seed, g_n)
    context_nTC = caption_n = None
    if config.context_shape is not None:
        field, shape = config.context_field, config.context_shape
        context_nTC = _arrays(chunk, field, shape, "data.context_shape", config.latent_dtype)
    if config.captions:
        caption_n = objects([text.decode("utf-8", "replace").strip() for text in _column(chunk, "txt")])
    return Samples(chunk["__key__"], x_nCHW, _labels(chunk, config), caption_n, context_nTC)


def synthesize(config: DataConfig, seed: int, g_n: Ints) -> Samples:
    """The samples g_n of kind `synthetic`: standard normal latents and contexts, uniform labels."""
    numbers = g_n.tolist()
    x_nCHW = np.empty((len(numbers), *config.x_shape), np.float32)
    label_n = None if config.num_classes is None else np.empty(len(numbers), np.int64)
    context_nTC = None if config.context_shape is None else np.empty((len(numbers), *config.context_shape), np.float32)
    for i, g in enumerate(numbers):
        rng = generator(seed, "synthetic sample", g)
        rng.standard_normal(dtype=np.float32, out=x_nCHW[i])
        if label_n is not None:
            label_n[i] = rng.integers(config.num_classes or 0)
        if context_nTC is not None:
            rng.standard_normal(dtype=np.float32, out=context_nTC[i])
    context_nTC = None if context_nTC is None else to_dtype(context_nTC, config.latent_dtype)
    key_n = objects([f"synthetic-{g}" for g in numbers])
    return Samples(key_n, to_dtype(x_nCHW, config.latent_dtype), label_n, None, context_nTC)


def _image(chunk: Chunk, row: int, config: DataConfig, crop_at: tuple[float, float]) -> Array:
    """The image of one sample, uint8 [C, image_size, image_size]. `crop_at`: as for `fitted`."""
    field = next((name for name in IMAGE_FIELDS if name in chunk), "png")
    data, size = _column(chunk, field, row)[row], config.image_size
    assert size is not None

    def check_size(width: int, height: int) -> None:
        if config.resize is None and (width, height) != (size, size):
            remedy = f"Set data.resize to `cover` or `pad`, or pack again with `msdiff data pack --size {size}`."
            if height == width:
                remedy = f"Set data.image_size to {height}. Or: {remedy}"
            problem = f"the image of {_sample_name(chunk, row)} is {width}x{height} pixels"
            raise DataError("data.image_size", size, problem, remedy)

    try:
        image = read_image(data, config.reading, check_size)
    except UNREADABLE as e:
        raise _field_error(
            chunk, row, field, f"is not a readable image ({e})", "Make the shard again without it."
        ) from e
    if config.resize is not None and image.size != (size, size):
        image = fitted(image, size, config.resize, crop_at)
    mode = "L" if config.channels == 1 else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[None] if config.channels == 1 else np.moveaxis(pixels, -1, 0)


def _latents(chunk: Chunk, config: DataConfig, flipped_n: NDArray[np.bool_], seed: int, g_n: Ints) -> Array:
    """x_nCHW of latents: mirrored where flipped_n, and sampled from their posterior if moments are stored."""
    C, H, W = config.x_shape
    field, shape = config.latent_field, (2 * C, H, W) if config.latent_moments else (C, H, W)
    # Moments are combined in float32, whatever type the latents are to have.
    dtype = "float32" if config.latent_moments else config.latent_dtype
    if not flipped_n.any():
        stored = _arrays(chunk, field, shape, "data.latent_shape", dtype)
    else:
        stem, dot, extension = field.rpartition(".")
        flipped = f"{stem}_flip{dot}{extension}"
        if flipped not in chunk:
            raise DataError(
                "data.flip", True, f"shard {chunk['__url__'][0]} has no {flipped}, and a mirrored latent is not the "
                "latent of the mirrored image", "Remove data.flip, or encode the images with encode.flip: true.",
            )  # fmt: skip
        # A copy, because the array may be a view of the block, which is read-only.
        stored = _arrays(chunk, field, shape, "data.latent_shape", dtype).copy()
        stored[flipped_n] = _arrays(chunk, flipped, shape, "data.latent_shape", dtype)[flipped_n]
    if not config.latent_moments:
        return stored
    # log variance to standard deviation: exp(v / 2)
    latents = stored[:, :C] + np.exp(stored[:, C:] / 2) * posterior_noise(seed, g_n, (C, H, W))
    return to_dtype(latents, config.latent_dtype)


def to_dtype(array: Array, dtype: str) -> Array:
    """Convert a floating array to another floating type; bfloat16 is uint16 of the same bits on either side."""
    if array.dtype == _DTYPES[dtype]:
        return array
    if dtype == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16).view(torch.uint16).numpy()
    if array.dtype == np.uint16:  # bfloat16 is the upper half of a float32
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype)


def _arrays(chunk: Chunk, field: str, shape: tuple[int, ...], setting: str, dtype: str) -> Array:
    """A field as [n, *shape] of the floating type `dtype`. `setting` is the recipe field that gives the shape."""

    def check(row: int, found: tuple[int, ...], kind: np.dtype[Any], types: str) -> None:
        if found != shape or kind.char not in types:
            problem = f"{field!r} of {_sample_name(chunk, row)} is {kind}{list(found)}"
            remedy = f"Correct {setting} or the shards."
            raise DataError(setting, list(shape), f"{problem}, not float{list(shape)}", remedy)

    # numpy's type characters: e, f, d are float16, float32, float64; H is uint16, as which blocks give bfloat16.
    column_n = _column(chunk, field)
    if column_n.dtype != object:
        check(0, column_n.shape[1:], column_n.dtype, "efdH")
        return to_dtype(column_n, dtype)
    arrays = []
    for row, content in enumerate(column_n):
        try:
            arrays.append(read_npy(content))
        except (ValueError, OSError, EOFError) as e:
            raise _field_error(chunk, row, field, f"is not a readable .npy array ({e})", "Make the shard again.") from e
        check(row, arrays[-1].shape, arrays[-1].dtype, "efd")
    return np.stack([to_dtype(array, dtype) for array in arrays])


def _labels(chunk: Chunk, config: DataConfig) -> Ints | None:
    if config.num_classes is None:
        return None
    column_n = _column(chunk, "cls")
    if column_n.dtype != object and (column_n.dtype != np.int64 or column_n.ndim != 1):
        problem = f"is {column_n.dtype}{list(column_n.shape[1:])}, not one int64"
        raise _field_error(chunk, 0, "cls", problem, "Make the shard again.")
    label_n = np.array([_label(text) for text in column_n]) if column_n.dtype == object else column_n
    if not 0 <= label_n.min() <= label_n.max() < config.num_classes:
        wrong_n = np.flatnonzero((label_n < 0) | (label_n >= config.num_classes))
        text = column_n[wrong_n[0]]
        shown = text[:20].decode("utf-8", "replace") if isinstance(text, bytes) else int(text)
        problem = f"{_sample_name(chunk, wrong_n[0])} has class {shown!r}"
        raise DataError("data.num_classes", config.num_classes, problem, "Set data.num_classes above every label.")
    return label_n


def _label(text: bytes) -> int:
    # Python also reads `1_0`, and refuses thousands of digits.
    return int(text) if _DIGITS.fullmatch(text) else -1  # out of range, so `_labels` reports it


def _column(chunk: Chunk, field: str, row: int = 0) -> Array:
    """The column of a field. If it is missing, the error names the sample in `row`."""
    if field not in chunk:
        present = ", ".join(sorted(name for name in chunk if not name.startswith("__")))
        raise _field_error(chunk, row, field, f"is missing (the sample has: {present})", "Use shards that have it.")
    return chunk[field]


def _field_error(chunk: Chunk, row: int, field: str, problem: str, remedy: str) -> DataError:
    key, url = chunk["__key__"][row], chunk["__url__"][row]
    return DataError("data.shards", url, f"field {field!r} of sample {key!r} {problem}", remedy)


def _sample_name(chunk: Chunk, row: int) -> str:
    return f"sample {chunk['__key__'][row]!r} in {chunk['__url__'][row]}"
