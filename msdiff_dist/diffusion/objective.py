"""What training minimises, as pure tensors: how a batch is noised, and the loss of the network's output on it.

The training step, gradient clustering and evaluation all ask here, so that they can never mean different losses.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from msdiff_dist.diffusion.loss import LossKind, sample_losses
from msdiff_dist.diffusion.process import Process


@dataclass(frozen=True, kw_only=True)
class NoisedBatch:
    """A batch as the network sees it, float32.

    x_nCHW: the network's input, c_in x_t. time_n: its time input, c_noise. target_nCHW: what its output is regressed
    on. weight_n: of each sample's loss.
    """

    x_nCHW: Tensor
    time_n: Tensor
    target_nCHW: Tensor
    weight_n: Tensor


class Objective:
    """The loss of a diffusion process: E weight(t) |F(c_in x_t, c_noise) - target|, squared for `l2` (Eq. 2)."""

    def __init__(self, process: Process, kind: LossKind = "l2") -> None:
        self.process, self.kind = process, kind

    def noised(self, x0_nCHW: Tensor, noise_nCHW: Tensor, t_n: Tensor) -> NoisedBatch:
        """The samples at times `t_n`, in the process's unit, with the given noise (Eq. 1)."""
        x_t = self.process.perturb(x0_nCHW, noise_nCHW, t_n)
        x_in, time_n = self.process.network_input(x_t, t_n)
        target = self.process.target(x0_nCHW, noise_nCHW, t_n)
        return NoisedBatch(x_nCHW=x_in, time_n=time_n, target_nCHW=target, weight_n=self.process.weight(t_n))

    def losses(self, output_nCHW: Tensor, batch: NoisedBatch, rows: slice = slice(None)) -> Tensor:
        """Weighted loss of each sample, float32 [n], of the network's output on `rows` of the batch."""
        return batch.weight_n[rows] * sample_losses(output_nCHW, batch.target_nCHW[rows], self.kind)
