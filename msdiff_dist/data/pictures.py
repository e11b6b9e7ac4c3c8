"""Every picture of a data set once, with its class: for classifiers and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.loader import load_index
from msdiff_dist.data.samples import decode
from msdiff_dist.data.tar_members import TarError, samples
from msdiff_dist.errors import ConfigError, DataError

_BATCH = 1000


def read_pictures(config: DataConfig) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of uint8 pictures [n, C, H, W], none mirrored, and int64 labels [n] if the data has `num_classes`.

    Raises:
        ConfigError: the data are not pictures. DataError: shards are missing, damaged, or hold other pictures.
    """
    if config.kind != "image":
        raise ConfigError("data.kind", config.kind, "holds no pictures", "Name shards of pictures, kind image.")
    config = replace(config, flip=False, captions=False, context_shape=None)
    pictures, labels = [], []
    for path in (shard.path for shards in load_index(config) for shard in shards):
        try:
            for raw in samples(path, config.access):
                sample = decode(raw, config, 0, 0)
                pictures.append(sample.x_CHW)
                labels.append(sample.label)
                if len(pictures) == _BATCH:
                    yield _batch(pictures, labels)
                    pictures, labels = [], []
        except (TarError, OSError) as e:
            raise DataError("data.shards", path, f"is damaged ({e})", "Copy or make the shard again.") from e
    if pictures:
        yield _batch(pictures, labels)


def _batch(pictures: list[np.ndarray], labels: list[int | None]) -> tuple[Tensor, Tensor | None]:
    return torch.from_numpy(np.stack(pictures)), None if labels[0] is None else torch.tensor(labels)
