"""`msdiff data check`: read every shard of a folder whole, and report the first corruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from msdiff_dist.data.access import DEFAULT_ACCESS
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.image_files import IMAGE_FIELDS, UNREADABLE, ImageReading, read_image
from msdiff_dist.data.index import find_shards
from msdiff_dist.data.latent_blocks import BLOCK_FIELD, BlockError, block_keys, check_block
from msdiff_dist.data.make.manifest import (
    MANIFEST,
    NULL_CONTEXT,
    Manifest,
    load_manifest,
    load_null_context,
    stored_file,
)
from msdiff_dist.data.npy import read_npy
from msdiff_dist.data.samples import decode
from msdiff_dist.data.tar_members import TarError, chunks, members, samples
from msdiff_dist.errors import DataError
from msdiff_dist.terminal import LongWork, track

REMEDY = "Copy or make it again."


def check_folder(folder: Path) -> int:
    """Verify a folder of shards: latents against their manifest, or images against their index, if any.

    Returns the number of samples.

    Raises:
        DataError: naming the first corrupt shard, and the corrupt sample where it is known.
    """
    manifest = load_manifest(str(folder / MANIFEST))
    if manifest is not None:
        return _check_latents(folder, manifest)
    if (folder / ".encode").is_dir():
        problem = "has no manifest.json: it was not encoded to its end"
        raise DataError("DIR", str(folder), problem, "Run the same `msdiff data encode` again.")
    shards = find_shards(str(folder))
    with LongWork("checking", sum(shard.num_samples for shard in shards), "samples") as work:
        return sum(_check_images(shard.path, shard.num_samples, work) for shard in shards)


def check_for_training(folder: Path, config: DataConfig) -> list[str]:
    """Decode every sample of a folder of shards as a recipe asks for it, and return notes on what is unusual.

    Args:
        config: the recipe's `data`, whose own shards are not read.

    Raises:
        DataError: naming the first sample that training would refuse, and how many others it would.
    """
    config = replace(config, shards=str(folder), sources=(), max_bad=0)
    first: DataError | None = None
    refused, samples_read, empty = 0, 0, 0
    shards = find_shards(str(folder))
    with LongWork("decoding", sum(shard.num_samples for shard in shards), "samples") as work:
        for shard in shards:
            try:
                for chunk in chunks(shard.path):
                    rows = len(chunk["__key__"])
                    samples_read += rows
                    work.advance(rows)
                    try:
                        decoded = decode(chunk, config, 0, np.arange(rows))
                    except DataError as e:  # blocks hold many samples of one kind, images come one by one
                        first, refused = first or e, refused + rows
                        continue
                    if decoded.caption_n is not None:
                        empty += sum(not caption for caption in decoded.caption_n)
            except (TarError, OSError) as e:
                raise DataError("DIR", shard.path, f"is corrupt ({e})", REMEDY) from e
    if first is not None:
        problem = f"{first.problem}; training would refuse {refused} of {samples_read} samples"
        raise DataError(first.field, first.value, problem, first.remedy)
    return [f"{empty} of {samples_read} captions are empty"] if empty else []


def _check_latents(folder: Path, manifest: Manifest) -> int:
    listed = {file.name for file in manifest.shards}
    extra = sorted(path.name for path in folder.glob("*.tar") if path.name not in listed)
    if extra:
        raise DataError("DIR", str(folder / extra[0]), "is not in the manifest", "Remove it, or encode again.")
    keys: dict[str, str] = {}  # of all samples so far, with the shard that holds them
    for file in track(manifest.shards, "checking", "shards"):
        path = folder / file.name
        if not path.is_file():
            raise DataError("DIR", str(path), "is missing", REMEDY)
        # Blocks first: they name the corrupt sample, where the checksum of the file only says that there is one.
        found = _check_blocks(path, manifest, keys)
        if found != file.samples:
            raise DataError("DIR", str(path), f"holds {found} samples, the manifest says {file.samples}", REMEDY)
        if stored_file(path, file.samples) != file:
            raise DataError("DIR", str(path), "is not what was written: its checksum is not the manifest's", REMEDY)
    if len(keys) != manifest.samples:
        raise DataError("DIR", str(folder), f"holds {len(keys)} samples, the manifest says {manifest.samples}", REMEDY)
    if manifest.null_context:
        load_null_context(str(folder / NULL_CONTEXT), manifest, DEFAULT_ACCESS)
    return manifest.samples


def _check_blocks(path: Path, manifest: Manifest, keys: dict[str, str]) -> int:
    """Check every block of a shard and add its keys to `keys`; returns the number of samples."""
    count, last = 0, None
    try:
        with path.open("rb") as stream:
            for name, content in members(stream):
                if not name.endswith(BLOCK_FIELD):
                    raise DataError("DIR", str(path), f"holds {name!r}, which is not a block of latents", REMEDY)
                names = _check_one_block(path, count, content, manifest)
                for key in names:
                    if key in keys:
                        raise DataError("DIR", str(path), f"sample {key!r} is also in {keys[key]}", "Encode again.")
                    keys[key] = str(path)
                count, last = count + len(names), names[-1]
    except (TarError, OSError) as e:
        where = f"after sample {last!r}" if last is not None else "before its first sample"
        raise DataError("DIR", str(path), f"is corrupt {where} ({e})", REMEDY) from e
    return count


def _check_one_block(path: Path, first: int, content: bytes, manifest: Manifest) -> list[str]:
    """The keys of a block whose first sample is number `first` of the shard."""
    try:
        keys, tensors = check_block(content)
    except BlockError as e:
        if e.row is None:
            raise DataError("DIR", str(path), f"from sample number {first} on: {e}", REMEDY) from e
        key = block_keys(content)[e.row]
        raise DataError("DIR", str(path), f"sample {key!r} (number {first + e.row}) is corrupt: {e}", REMEDY) from e
    channels, height, width = manifest.shape
    stored: tuple[int, ...] = (2 * channels if manifest.moments else channels, height, width)
    expected: dict[str, tuple[int, ...]] = {"latent.npy": stored} | (
        {"latent_flip.npy": stored} if manifest.flip else {}
    )
    if manifest.context_shape:
        expected["context.npy"] = manifest.context_shape
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape[1:]) != shape or tensor.dtype != getattr(torch, manifest.dtype):
            found = None if tensor is None else f"{tensor.dtype}{list(tensor.shape[1:])}"
            problem = f"{name} of sample {keys[0]!r} is {found}, the manifest says {manifest.dtype}{list(shape)}"
            raise DataError("DIR", str(path), problem, "Encode again.")
        finite = tensor.float().flatten(1).isfinite().all(dim=1)
        if not finite.all():
            key = keys[int((~finite).nonzero()[0])]
            raise DataError("DIR", str(path), f"{name} of sample {key!r} is not finite", "Encode again.")
    return keys


def _check_images(path: str, stated: int, work: LongWork) -> int:
    last, count = None, 0
    try:
        for raw in samples(path):
            for name, content in raw.items():
                problem = None if name.startswith("__") else _decoding_problem(name, content)
                if problem:
                    raise DataError("DIR", path, f"field {name!r} of sample {raw['__key__']!r} {problem}", REMEDY)
            last, count = raw["__key__"], count + 1
            work.advance()
    except (TarError, OSError) as e:
        where = f"after sample {last!r}" if last is not None else "before its first sample"
        raise DataError("DIR", path, f"is corrupt {where} ({e})", REMEDY) from e
    if count != stated:
        raise DataError("DIR", path, f"holds {count} samples, its index says {stated}", REMEDY)
    return count


def _decoding_problem(name: str, content: bytes) -> str | None:
    try:
        if name in IMAGE_FIELDS:
            read_image(content, ImageReading())
        elif name.endswith("npy") and isinstance(content, bytes):
            read_npy(content)
    except UNREADABLE as e:
        return f"cannot be decoded ({e})"
    return None
