"""Every image of a data set once, in the order of the shards: for classifiers and statistics, not for training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.loader import load_index
from msdiff_dist.data.samples import Samples, decode
from msdiff_dist.data.tar_members import TarError, chunks
from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.terminal import LongWork

_BATCH = 1000


def read_images(config: DataConfig) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of uint8 images [n, C, H, W], none mirrored, and int64 labels [n] if the data has `num_classes`.

    Raises:
        ConfigError: the data are not images.
        DataError: shards are missing or corrupt, or their images are not of the configured size or labels.
    """
    if config.kind != "image":
        raise ConfigError("data.kind", config.kind, "holds no images", "Use a recipe whose data.kind is image.")
    config = replace(config, flip=False, captions=False, context_shape=None)
    # No seed or sample number is needed: without flip, decoding draws nothing.
    read: list[Samples] = []
    shards = [shard for source in load_index(config) for shard in source]
    with LongWork("reading", sum(shard.num_samples for shard in shards), "images") as work:
        for path in (shard.path for shard in shards):
            try:
                for chunk in chunks(path, config.access):
                    read.append(decode(chunk, config, 0, np.zeros(len(chunk["__key__"]), np.int64)))
                    work.advance(len(chunk["__key__"]))
                    if len(read) == _BATCH:
                        yield _batch(read)
                        read = []
            except (TarError, OSError) as e:
                raise DataError("data.shards", path, f"is corrupt ({e})", "Copy or make the shard again.") from e
    if read:
        yield _batch(read)


def _batch(read: list[Samples]) -> tuple[Tensor, Tensor | None]:
    labels = [part.label_n for part in read if part.label_n is not None]
    images = torch.from_numpy(np.concatenate([part.x_nCHW for part in read]))
    return images, torch.from_numpy(np.concatenate(labels)) if labels else None
