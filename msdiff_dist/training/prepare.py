"""From routed samples and what was drawn for them to the network's inputs: latents, augmentation, noise, conditions.

All of it runs on the device, and the host waits for none of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msdiff_dist.diffusion.augmentation import transformed
from msdiff_dist.diffusion.objective import NoisedBatch, Objective
from msdiff_dist.models.autoencoder import LatentCodec
from msdiff_dist.training.feed import MicroBatch


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What stands for dropped conditions, which train the unconditional model of classifier-free guidance.

    Attributes:
        null_label: the class that stands for "no class"; None for data without classes.
        null_context_TC: the context that stands for "no caption", of the type and on the device of the network's
            inputs; None: zeros.
    """

    null_label: int | None = None
    null_context_TC: Tensor | None = None

    def drop(self, label_n: Tensor | None, context_nTC: Tensor | None, dropped_n: Tensor) -> tuple[Tensor | None, ...]:
        """(label_n, context_nTC) in which the samples where `dropped_n` is true have null conditions."""
        if label_n is not None and self.null_label is not None:
            label_n = label_n.masked_fill(dropped_n, self.null_label)
        if context_nTC is not None:
            where = dropped_n[:, None, None]
            null = self.null_context_TC
            context_nTC = context_nTC.masked_fill(where, 0) if null is None else torch.where(where, null, context_nTC)
        return label_n, context_nTC


@dataclass(frozen=True, kw_only=True)
class PreparedBatch:
    """A micro batch ready for the engines.

    Attributes:
        inputs: inputs of the shared encoder: x, time, context, label, augmentation labels; None where the model takes
            none.
        noised: what the objective needs to compute the loss of the outputs.
        x0_nCHW: the clean samples, augmented as the network sees them, float32.
    """

    inputs: tuple[Tensor | None, ...]
    noised: NoisedBatch
    x0_nCHW: Tensor


class Preparation:
    """Prepares this rank's micro batches.

    Args:
        device: the device of the network.
        dtype, memory_format: type and memory format of the network's input.
    """

    def __init__(
        self,
        objective: Objective,
        codec: LatentCodec,
        conditioning: Conditioning,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._objective, self._codec, self._conditioning = objective, codec, conditioning
        self._device, self._dtype, self._memory_format = device, dtype, memory_format

    def __call__(self, micro: MicroBatch) -> PreparedBatch:
        """The micro batch on the device: noised, and in the form that the network takes."""
        drawn, augment_labels = micro.drawn, None
        x0_nCHW = self._codec.to_latents(micro.samples.x_nCHW)
        if drawn.transforms is not None:
            transforms = drawn.transforms.each(self._on_device)
            x0_nCHW, augment_labels = transformed(x0_nCHW, transforms), transforms.label_n
        noise_nCHW, t_n = self._on_device(drawn.noise_nCHW), self._on_device(drawn.t_n)
        noised = self._objective.noised(x0_nCHW, noise_nCHW, t_n)
        label_n, context_nTC = self.conditions(micro)
        x_nCHW = noised.x_nCHW.to(self._dtype, memory_format=self._memory_format)
        inputs = (x_nCHW, noised.time_n, context_nTC, label_n, augment_labels)
        return PreparedBatch(inputs=inputs, noised=noised, x0_nCHW=x0_nCHW)

    def conditions(self, micro: MicroBatch) -> tuple[Tensor | None, ...]:
        """(label_n, context_nTC) of the micro batch after dropping; None where the data have none."""
        label_n, context_nTC = micro.samples.label_n, micro.samples.context_nTC
        if context_nTC is not None:
            context_nTC = context_nTC.to(self._dtype)
        if micro.drawn.dropped_n is None:
            return label_n, context_nTC
        return self._conditioning.drop(label_n, context_nTC, self._on_device(micro.drawn.dropped_n))

    def _on_device(self, tensor: Tensor) -> Tensor:
        # Drawn into page-locked memory, which torch does not use again before the copy is done: nothing waits.
        return tensor.to(self._device, non_blocking=True)
