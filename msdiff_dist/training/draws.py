"""The random numbers of a rank's micro batches: times, noise, dropped conditions, augmentations.

They come from `randomness`, by the number of the global batch and each sample's index in it, so they do not depend on
the rank. They are drawn on the CPU, which makes them the same for every device, while an earlier micro batch is
computed: drawing the noise of large images takes as long as a good part of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.diffusion.augmentation import AugmentationConfig, Transforms, draw_transforms
from msdiff_dist.randomness import dropped_conditions, module_seed, noise


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What is drawn for the n samples of one micro batch on this rank, in the order of its rows; on the host.

    Attributes:
        t_n: time of each sample, in the process's own variable.
        noise_nCHW: the noise that is added to them, float32.
        dropped_n: bool, whether a sample's conditions are dropped; None if none ever are.
        transforms: of the images; None without augmentation.
        module_seed: seed of the network's dropout layers.
    """

    t_n: Tensor
    noise_nCHW: Tensor
    dropped_n: Tensor | None
    transforms: Transforms | None
    module_seed: int


class Drawing:
    """Draws what each micro batch needs.

    Args:
        seed: the run's seed.
        shape: [C, H, W] of what is noised.
        condition_dropout: probability of dropping a sample's conditions.
        augmentation: None: no augmentation.
        pinned: whether to draw into page-locked memory, from which a GPU copies without the host waiting for it.
    """

    def __init__(
        self,
        *,
        seed: int,
        shape: Sequence[int],
        condition_dropout: float = 0.0,
        augmentation: AugmentationConfig | None = None,
        pinned: bool = False,
    ) -> None:
        self._seed, self._shape, self._pinned = seed, tuple(shape), pinned
        self._condition_dropout, self._augmentation = condition_dropout, augmentation

    def __call__(self, batch: int, index_n: np.ndarray, t_n: np.ndarray) -> Draws:
        """The draws for the samples of global batch `batch` with these indices in it, whose times are `t_n`."""
        dropped_n = transforms = None
        if self._condition_dropout:
            dropped_n = self._host(dropped_conditions(self._seed, batch, index_n, self._condition_dropout))
        if self._augmentation:
            transforms = draw_transforms(self._augmentation, self._seed, batch, index_n).each(self._host)
        return Draws(
            t_n=self._host(torch.from_numpy(t_n)),
            noise_nCHW=noise(self._seed, batch, index_n, self._shape, pinned=self._pinned),
            dropped_n=dropped_n,
            transforms=transforms,
            module_seed=module_seed(self._seed, batch, int(index_n[0]) if len(index_n) else 0),
        )

    def _host(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pinned else tensor
