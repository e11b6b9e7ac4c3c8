"""`msdiff data bench`: how fast the package's loader reads a recipe's shards, and other readers the same files.

All readers decode the same samples. The others are what one would write with their libraries.
"""

from __future__ import annotations

import importlib.util
import io
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from msdiff_dist.bounds import check_between
from msdiff_dist.data.access import is_local
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.image_files import IMAGE_FIELDS
from msdiff_dist.data.index import Shard
from msdiff_dist.data.latent_blocks import BLOCK_FIELD
from msdiff_dist.data.loader import StepLoader, load_index
from msdiff_dist.data.worker_processes import set_up_worker
from msdiff_dist.errors import DataError
from msdiff_dist.terminal import track

Batches = Any  # an iterator of batches
_ROUNDS = 3


@dataclass(frozen=True)
class Speed:
    """The speed of one reader, divided by the number of its workers.

    Attributes:
        reader: name of the reader.
        samples: samples per second.
        megabytes: 10**6 bytes of shards per second; NaN if the shards' sizes are not known.
    """

    reader: str
    samples: float
    megabytes: float


def bench(config: DataConfig, batch_size: int, seconds: float) -> list[Speed]:
    """Measure every reader that is installed, in turns of `seconds`, and keep the best turn of each.

    Raises:
        DataError: the recipe has no shards, or they are corrupt.
    """
    check_between("--batch-size", batch_size, 1, 10**6)
    check_between("--seconds", seconds, 0, 3600)
    index = load_index(config)
    if not index:
        raise DataError("data.kind", config.kind, "has no shards to read", "Choose a recipe that has.")
    shards = [shard for source in index for shard in source]
    known_size = all(shard.size for shard in shards)
    per_sample = sum(shard.size or 0 for shard in shards) / sum(shard.num_samples for shard in shards)
    with ExitStack() as stack:
        running = {name: start() for name, start in _readers(config, batch_size, index, shards, stack).items()}
        # The readers take turns, so that a slow spell of the machine does not fall on one of them alone.
        best = dict.fromkeys(running, 0.0)
        for name in track([*running] * _ROUNDS, "measuring", "turns"):
            rate = _rate(running[name], config.workers, batch_size, seconds) / max(config.workers, 1)
            best[name] = max(best[name], rate)
        running["msdiff"].close()
    return [Speed(name, rate, rate * per_sample / 1e6 if known_size else float("nan")) for name, rate in best.items()]


def _rate(batches: Batches, workers: int, batch_size: int, seconds: float) -> float:
    """Samples per second of an endless iterator of batches."""
    # While the other readers had their turns, each worker filled its queue of two batches. Those are not counted.
    for _ in range(1 + 2 * workers):
        next(batches)
    begun, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begun) < seconds:
        next(batches)
        count += 1
    return count * batch_size / elapsed


def _readers(
    config: DataConfig, batch_size: int, index: list[list[Shard]], shards: list[Shard], stack: ExitStack
) -> dict[str, Callable[[], Batches]]:
    readers: dict[str, Callable[[], Batches]] = {
        "msdiff": lambda: iter(StepLoader(config, 0, batch_size, index=index)),
    }
    # The other readers open paths only.
    paths = [shard.path for shard in shards if shard.num_samples]
    if not all(map(is_local, paths)):
        return readers
    workers = min(config.workers, len(paths))
    readers["torch DataLoader"] = lambda: _loaded(_TarFiles(paths, config), batch_size, workers)
    readers["torch DataLoader, shuffled"] = lambda: _loaded(_TarFiles(paths, config, True), batch_size, workers)
    readers["webdataset"] = lambda: _loaded(_WebDataset(paths, config), batch_size, workers)
    if importlib.util.find_spec("streaming"):
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        readers["mosaicml-streaming"] = _streaming(paths, config, batch_size, workers, Path(folder))
    return readers


def _loaded(dataset: Any, batch_size: int, workers: int) -> Batches:
    loader: DataLoader[Tensor] = DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=set_up_worker,
    )
    return _endless(loader)


def _endless(loader: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches of a reader, again and again.

    Raises:
        DataError: it gives none, so that a measurement of it would wait for ever.
    """
    while True:
        batches = iter(loader)
        first = next(batches, None)
        if first is None:
            problem = "another reader finds no sample in the shards"
            raise DataError("data.shards", "...", problem, "Check them with `msdiff data check`.")
        yield first
        yield from batches


class _TarFiles(IterableDataset[Tensor]):
    """The simplest reader: tarfile with PIL or numpy, shards in random order; `shuffled`: samples in a window too."""

    def __init__(self, paths: list[str], config: DataConfig, shuffled: bool = False) -> None:
        self._paths, self._config, self._shuffled = paths, config, shuffled

    def __iter__(self) -> Iterator[Tensor]:
        read = self._read()
        yield from webdataset.filters.shuffle(self._config.shuffle)(read) if self._shuffled else read

    def _read(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        paths = self._paths[worker.id :: worker.num_workers] if worker else list(self._paths)
        random.shuffle(paths)
        for path in paths:
            with tarfile.open(path) as archive:
                for member in archive:
                    extension = member.name.rsplit("/", 1)[-1].split(".", 1)[-1]
                    content = archive.extractfile(member)
                    if content and _is_sample(extension, self._config):
                        yield from _decoded(extension, content.read(), self._config)


class _WebDataset(IterableDataset[Tensor]):
    """webdataset as documented, with the recipe's shuffle window; samples of blocks are shuffled one by one."""

    def __init__(self, paths: list[str], config: DataConfig) -> None:
        self._paths, self._config = paths, config

    def __iter__(self) -> Iterator[Tensor]:
        dataset = webdataset.WebDataset(self._paths, shardshuffle=len(self._paths), empty_check=False)
        if self._config.kind == "image":
            yield from self._samples(dataset.shuffle(self._config.shuffle))
        else:
            yield from webdataset.filters.shuffle(self._config.shuffle)(self._samples(dataset))

    def _samples(self, dataset: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
        for sample in dataset:
            for extension, content in sample.items():
                if _is_sample(extension, self._config):
                    yield from _decoded(extension, content, self._config)


def _streaming(
    paths: list[str], config: DataConfig, batch_size: int, workers: int, folder: Path
) -> Callable[[], Batches]:
    """mosaicml-streaming, over a copy in its own format in `folder`."""
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"extension": "str", "content": "bytes"}) as writer:
        for path in paths:
            for sample in webdataset.WebDataset([path], shardshuffle=False):
                for extension, content in sample.items():
                    if _is_sample(extension, config):
                        writer.write({"extension": extension, "content": content})

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch_size)
    return lambda: _loaded(_Decoded(dataset, config), batch_size, workers)


class _Decoded(IterableDataset[Tensor]):
    """Decodes the records of `_streaming`."""

    def __init__(self, records: Iterable[dict[str, Any]], config: DataConfig) -> None:
        self._records, self._config = records, config

    def __iter__(self) -> Iterator[Tensor]:
        for record in self._records:
            yield from _decoded(record["extension"], record["content"], self._config)


def _is_sample(extension: str, config: DataConfig) -> bool:
    known = IMAGE_FIELDS if config.kind == "image" else (config.latent_field, BLOCK_FIELD)
    return extension.lower() in known


def _decoded(extension: str, content: bytes, config: DataConfig) -> Iterable[Tensor]:
    if extension == BLOCK_FIELD:
        return load(content)[config.latent_field]
    if config.kind == "latent":
        return [torch.from_numpy(np.load(io.BytesIO(content)))]
    image = Image.open(io.BytesIO(content)).convert("L" if config.channels == 1 else "RGB")
    return [torch.from_numpy(np.array(image).reshape(*image.size[::-1], -1)).movedim(-1, 0)]
