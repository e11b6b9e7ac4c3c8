"""The samples of one global batch that a rank or a worker reads, as tensors.

Lanes fill the rows of a buffer in their own order, and what the workers of a rank have read of a step is joined.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.corruption import Corruption
from msdiff_dist.data.order import Ints
from msdiff_dist.data.samples import Samples


@dataclass(frozen=True, kw_only=True)
class StepSamples:
    """The samples of one global batch that one rank reads, in ascending order of their index in the batch.

    Attributes:
        batch: number of the global batch, from 0.
        index_n: int64, in [0, global_batch_size).
        x_nCHW: uint8 images or floating latents. Only n differs between steps and ranks; it may be 0.
        label_n: int64 class labels, if the data has `num_classes`.
        context_nTC: context embeddings, if the data has `context_shape`.
        captions: n captions, if the data has `captions`.
        keys: n names of samples in their shards.
        corruption: what was found corrupt, for the first time, while this step was read, and was skipped.
    """

    batch: int
    index_n: Ints
    x_nCHW: Tensor
    label_n: Tensor | None
    context_nTC: Tensor | None
    captions: list[str] | None
    keys: list[str]
    corruption: tuple[Corruption, ...] = ()


class BatchBuffer:
    """Tensors for n samples of a step, filled lane by lane."""

    def __init__(self, config: DataConfig, n: int) -> None:
        def empty(shape: tuple[int, ...], dtype: str) -> Tensor:
            return torch.empty((n, *shape), dtype=getattr(torch, dtype))

        context = config.context_shape
        self._x_nCHW = empty(config.x_shape, config.x_dtype)
        self._label_n = None if config.num_classes is None else empty((), "int64")
        self._context_nTC = None if context is None else empty(context, config.latent_dtype)
        self._key_n = np.empty(n, object)
        self._caption_n = np.empty(n, object) if config.captions else None
        # Samples are arrays, which are written through numpy views of the tensors.
        views = (_view(self._x_nCHW), _view(self._label_n), self._caption_n, _view(self._context_nTC))
        self._columns = Samples(self._key_n, *views)

    def put(self, at_n: Ints, samples: Samples) -> None:
        """Copy samples to rows at_n."""
        column: Any
        for column, values in zip(self._columns, samples, strict=True):
            if column is not None:
                column[at_n] = values

    def samples(self, batch: int, index_n: Ints, corruption: tuple[Corruption, ...]) -> StepSamples:
        """The step's samples, once all rows are filled."""
        captions = None if self._caption_n is None else self._caption_n.tolist()
        return StepSamples(
            batch=batch,
            index_n=index_n,
            x_nCHW=self._x_nCHW,
            label_n=self._label_n,
            context_nTC=self._context_nTC,
            captions=captions,
            keys=self._key_n.tolist(),
            corruption=corruption,
        )


def _view(tensor: Tensor | None) -> Any:
    """A tensor's memory as an array; bfloat16, which numpy lacks, as uint16 of the same bits."""
    return None if tensor is None else (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def merged_parts(parts: list[StepSamples]) -> StepSamples:
    """Join the workers' parts of one step, sorted by index in the batch."""
    if len(parts) == 1:
        return parts[0]
    assert len({part.batch for part in parts}) == 1, "each worker yields every step"
    index_n = np.concatenate([part.index_n for part in parts])
    order_n = np.argsort(index_n)

    def tensors(values: list[Any]) -> Any:
        return None if values[0] is None else torch.cat(values)[torch.from_numpy(order_n)]

    def lists(values: list[Any]) -> Any:
        every = None if values[0] is None else list(itertools.chain(*values))
        return None if every is None else [every[i] for i in order_n]

    return StepSamples(
        batch=parts[0].batch,
        index_n=index_n[order_n],
        x_nCHW=tensors([part.x_nCHW for part in parts]),
        label_n=tensors([part.label_n for part in parts]),
        context_nTC=tensors([part.context_nTC for part in parts]),
        captions=lists([part.captions for part in parts]),
        keys=lists([part.keys for part in parts]),
        corruption=tuple(itertools.chain(*(part.corruption for part in parts))),
    )
