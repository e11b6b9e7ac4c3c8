"""Encoding one shard of images to one shard of latents. The caller supplies the networks.

What a shard becomes depends on its content, its number and the recipe, not on the process that encodes it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.bounds import check_between, check_seed
from msdiff_dist.config import from_mapping
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.corruption import Corruption, CorruptionReport
from msdiff_dist.data.index import FIELD, Shard
from msdiff_dist.data.latent_blocks import BLOCK_FIELD, pack_block
from msdiff_dist.data.make.manifest import ManifestFile, stored_file
from msdiff_dist.data.make.shard_writer import Fields, write_shard
from msdiff_dist.data.samples import Samples, decode
from msdiff_dist.data.tar_members import TarError, chunks
from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.files.json_text import parse_mapping
from msdiff_dist.randomness import generator


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """The `encode` section of a recipe: what `msdiff data encode` makes."""

    data: DataConfig | None = None
    """Images to encode. null: those of the recipe's `data`."""
    store: Literal["samples", "moments"] = "samples"
    """What is stored of the autoencoder's posterior: one sample of it (`samples`), or for kind `kl` its `moments`, from
    which every visit draws a new sample."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Floating type of the stored latents and contexts."""
    flip: bool = False
    """Whether to store the latents of the mirrored images too."""
    block: int = 256
    """Samples per tar member."""
    batch_size: int = 32
    """Images that the autoencoder encodes at once, and captions that the text encoder does."""
    measure_scale: bool = False
    """Whether to use one over the standard deviation of the latents as their scale factor."""
    seed: int = 0
    """Seed of the noise with which the posterior is sampled."""

    def __post_init__(self) -> None:
        for name in ("block", "batch_size"):
            check_between(name, getattr(self, name), 1, 2**20)
        check_seed("seed", self.seed)


@dataclass(frozen=True)
class Networks:
    """The frozen networks that encode.

    Attributes:
        encode: uint8 images [n, C, H, W] to float latents [n, c, h, w], or with `posterior` to their mean and log
            variance, [n, 2c, h, w].
        posterior: whether `encode` returns moments.
        embed: n captions to context [n, T, D] and mask [n, T], false at padding; None if captions are not embedded.
    """

    encode: Callable[[Tensor], Tensor]
    posterior: bool
    embed: Callable[[Sequence[str]], tuple[Tensor, Tensor]] | None


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What became of one shard, kept as JSON until the manifest is written.

    Attributes:
        file: the shard of latents.
        mark: fingerprint of the shard of images.
        shape: (c, h, w) of a latent; None if no sample could be encoded.
        count: number of values in all latents, whose sum and sum of squares are `sum` and `squares`.
        left_out: the corrupt samples that were skipped, in words.
    """

    file: ManifestFile
    mark: str
    shape: tuple[int, ...] | None
    count: int
    sum: float
    squares: float
    left_out: list[str] = field(default_factory=list)

    def dump(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self))

    @staticmethod
    def load(path: Path) -> ShardRecord | None:
        """Read a record; None if it is absent or incomplete."""
        try:
            return from_mapping(ShardRecord, parse_mapping(path.read_bytes()))
        except (OSError, ValueError, ConfigError):
            return None


class ShardEncoder:
    """Encodes whole shards.

    Args:
        source: where the images are and what is read with them.

    Attributes:
        encoded: called with the number of images that were encoded, after each batch.
    """

    def __init__(self, config: EncodeConfig, source: DataConfig, networks: Networks) -> None:
        self._config, self._networks = config, networks
        # Images are decoded unmirrored: latents of mirrored ones are made here. To be embedded, captions are read.
        captions = source.captions or networks.embed is not None
        self._source = replace(source, flip=False, captions=captions)
        self.encoded: Callable[[int], object] = lambda images: None

    def __call__(self, number: int, shard: Shard, mark: str, target: Path) -> ShardRecord:
        """Write the latents of shard `number` of the source, of fingerprint `mark`, to `target`.

        Raises:
            DataError: more than `data.max_bad` of its samples are corrupt.
        """
        report = CorruptionReport(self._source.max_bad)
        totals = _Totals()
        read = self._decoded(shard, report)

        def blocks() -> Iterator[tuple[str, Fields]]:
            first = 0
            while rows := list(itertools.islice(read, self._config.block)):
                yield f"{first:08d}", {BLOCK_FIELD: self._block(rows, number, first, totals)}
                first += len(rows)
            totals.samples = first

        write_shard(target, blocks())
        left_out = [str(corruption) for corruption in report.take()]
        file = stored_file(target, totals.samples)
        return ShardRecord(
            file=file,
            mark=mark,
            shape=totals.shape,
            count=totals.count,
            sum=totals.sum,
            squares=totals.squares,
            left_out=left_out,
        )

    def _decoded(self, shard: Shard, report: CorruptionReport) -> Iterator[Samples]:
        """The samples of a shard that can be decoded, one by one; the others are added to `report`."""

        def duplicate(key: str, what: str) -> None:
            report.add(
                Corruption(shard.path, key, what), DataError(FIELD, shard.path, f"{key!r}: {what}", "Repair it.")
            )

        try:
            for chunk in chunks(shard.path, self._source.access, duplicate):
                for row, key in enumerate(chunk["__key__"]):
                    sample = {name: column[row : row + 1] for name, column in chunk.items()}
                    # Seed and sample number decide mirroring and posterior noise, and images without flip have neither.
                    try:
                        yield decode(sample, self._source, 0, np.zeros(1, np.int64))
                    except DataError as e:
                        report.add(Corruption(shard.path, key, f"{e.field}: {e.problem}"), e)
        except (TarError, OSError) as e:
            error = DataError(FIELD, shard.path, f"cannot be read to its end ({e})", "Copy or make it again.")
            report.add(Corruption(shard.path, None, error.problem), error)

    def _block(self, rows: list[Samples], number: int, first: int, totals: _Totals) -> bytes:
        """The content of a block: samples first, first + 1, ... of shard `number`."""
        dtype = getattr(torch, self._config.dtype)
        images = torch.from_numpy(np.concatenate([row.x_nCHW for row in rows]))
        latents, drawn = self._latents(images, "encode", number, first, self.encoded)
        totals.add(drawn)
        tensors = {"latent.npy": latents.to(dtype)}
        if self._config.flip:
            tensors["latent_flip.npy"] = self._latents(images.flip(-1), "encode flipped", number, first)[0].to(dtype)
        if self._source.num_classes is not None:
            tensors["cls"] = torch.from_numpy(np.concatenate([row.label_n for row in rows if row.label_n is not None]))
        captions = [row.caption_n[0] for row in rows if row.caption_n is not None] if self._source.captions else None
        if self._networks.embed and captions is not None:
            parts = [self._networks.embed(captions[i]) for i in self._batches(len(rows))]
            tensors["context.npy"] = torch.cat([context for context, _ in parts]).to(dtype)
            tensors["context_mask.npy"] = torch.cat([mask for _, mask in parts])
        return pack_block([row.key_n[0] for row in rows], tensors, captions)

    def _latents(
        self,
        images: Tensor,
        purpose: str,
        number: int,
        first: int,
        count: Callable[[int], object] = lambda images: None,
    ) -> tuple[Tensor, Tensor]:
        """(what is stored, sampled latents) of images first, first + 1, ... of shard `number`."""
        batches = []
        for rows in self._batches(len(images)):
            batches.append(self._networks.encode(images[rows]))
            count(len(batches[-1]))
        encoded = torch.cat(batches)
        if not self._networks.posterior:
            return encoded, encoded
        mean, log_variance = encoded.chunk(2, dim=1)
        # Noise is keyed by shard and sample, so neither blocks nor batches nor parts change it.
        noise = [
            generator(self._config.seed, purpose, number, first + i).standard_normal(mean.shape[1:], dtype=np.float32)
            for i in range(len(mean))
        ]
        drawn = mean + torch.exp(log_variance / 2) * torch.from_numpy(np.stack(noise))
        return (encoded if self._config.store == "moments" else drawn), drawn

    def _batches(self, n: int) -> list[slice]:
        """Slices of at most `encode.batch_size` that cover n samples."""
        return [slice(i, i + self._config.batch_size) for i in range(0, n, self._config.batch_size)]


@dataclass(kw_only=True)
class _Totals:
    """Sums over a shard, as `ShardRecord` describes them."""

    samples: int = 0
    shape: tuple[int, ...] | None = None
    count: int = 0
    sum: float = 0.0
    squares: float = 0.0

    def add(self, latents: Tensor) -> None:
        values = latents.double()
        self.shape = tuple(latents.shape[1:])
        self.count += values.numel()
        self.sum += float(values.sum())
        self.squares += float(values.square().sum())


def measured_scale(records: Sequence[ShardRecord]) -> float:
    """One over the standard deviation of all values of all latents, to six significant digits.

    Raises:
        DataError: the latents do not vary.
    """
    count = sum(record.count for record in records)
    mean = sum(record.sum for record in records) / count
    variance = sum(record.squares for record in records) / count - mean**2
    if not variance > 0:
        raise DataError("encode.measure_scale", True, "all latents are the same", "Remove it.")
    return float(f"{1 / math.sqrt(variance):.6g}")
