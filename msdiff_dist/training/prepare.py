"""From routed samples to the network's inputs: latents, augmentation, noise, dropped conditions.

All random numbers come from `randomness`, by the number of the global batch and each sample's index in it. So they do
not depend on the rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msdiff_dist.diffusion.augmentation import AugmentationConfig, augment
from msdiff_dist.diffusion.objective import NoisedBatch, Objective
from msdiff_dist.models.autoencoder import LatentCodec
from msdiff_dist.randomness import dropped_conditions, noise
from msdiff_dist.training.feed import MicroBatch


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """How conditions are dropped, which trains the unconditional model of classifier-free guidance.

    Attributes:
        dropout: probability of training a sample without its class and caption.
        null_label: the class that stands for "no class"; None for data without classes.
        null_context_TC: the context that stands for "no caption"; None: zeros.
    """

    dropout: float = 0.0
    null_label: int | None = None
    null_context_TC: Tensor | None = None

    def drop(self, label_n: Tensor | None, context_nTC: Tensor | None, dropped_n: Tensor) -> tuple[Tensor | None, ...]:
        """(label_n, context_nTC) in which the samples where `dropped_n` is true have null conditions."""
        if label_n is not None and self.null_label is not None:
            label_n = label_n.masked_fill(dropped_n, self.null_label)
        if context_nTC is not None:
            null = torch.zeros(()) if self.null_context_TC is None else self.null_context_TC
            context_nTC = torch.where(dropped_n[:, None, None], null.to(context_nTC), context_nTC)
        return label_n, context_nTC


@dataclass(frozen=True, kw_only=True)
class PreparedBatch:
    """A micro batch ready for the engines.

    Attributes:
        inputs: inputs of the shared encoder: x, time, context, label, augmentation labels; None where the model takes
            none.
        noised: what the objective needs to compute the loss of the outputs.
    """

    inputs: tuple[Tensor | None, ...]
    noised: NoisedBatch


class Preparation:
    """Prepares this rank's micro batches.

    Args:
        augmentation: None: no augmentation.
        seed: the run's seed.
        device: the device of the network.
        dtype, memory_format: type and memory format of the network's input.
    """

    def __init__(
        self,
        objective: Objective,
        codec: LatentCodec,
        conditioning: Conditioning,
        augmentation: AugmentationConfig | None,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._objective, self._codec, self._conditioning = objective, codec, conditioning
        self._augmentation, self._seed, self._device = augmentation, seed, device
        self._dtype, self._memory_format = dtype, memory_format

    def __call__(self, micro: MicroBatch) -> PreparedBatch:
        """The micro batch on the device: noised, and in the form that the network takes."""
        samples, index_n = micro.samples, micro.samples.index_n
        x0_nCHW = self._codec.to_latents(samples.x_nCHW.to(self._device))
        augment_labels = None
        if self._augmentation:
            x0_nCHW, augment_labels = augment(x0_nCHW, self._augmentation, self._seed, micro.batch, index_n)
        # Drawn by index on the CPU, so that it is the same on every device and rank.
        noise_nCHW = noise(self._seed, micro.batch, index_n, tuple(x0_nCHW.shape[1:])).to(self._device)
        noised = self._objective.noised(x0_nCHW, noise_nCHW, micro.t_n.to(self._device))
        label_n, context_nTC = self.conditions(micro)
        x_nCHW = noised.x_nCHW.to(self._dtype, memory_format=self._memory_format)
        return PreparedBatch(inputs=(x_nCHW, noised.time_n, context_nTC, label_n, augment_labels), noised=noised)

    def conditions(self, micro: MicroBatch) -> tuple[Tensor | None, ...]:
        """(label_n, context_nTC) of the micro batch after dropping; None where the data have none."""
        samples = micro.samples
        context_nTC = None if samples.context_nTC is None else samples.context_nTC.to(self._device, self._dtype)
        label_n = None if samples.label_n is None else samples.label_n.to(self._device)
        if self._conditioning.dropout and (context_nTC is not None or label_n is not None):
            dropped_n = dropped_conditions(self._seed, micro.batch, samples.index_n, self._conditioning.dropout)
            return self._conditioning.drop(label_n, context_nTC, dropped_n.to(self._device))
        return label_n, context_nTC
