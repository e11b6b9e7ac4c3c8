"""The training objective on tensors: how a batch is noised, and the loss of the network's output on it.

The training step, gradient clustering and evaluation all use this class, so that they compute the same loss. Eqs. 1
and 2 are those of 2312.09181.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from msdiff_dist.diffusion.loss import LossKind, sample_losses
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.training_times import TrainingTimes


@dataclass(frozen=True, kw_only=True)
class NoisedBatch:
    """What the network and the loss take of a batch, all float32.

    Attributes:
        x_nCHW: the network's image input, c_in x_t.
        time_n: the network's time input, c_noise.
        target_nCHW: what the network's output is regressed on.
        weight_n: weight of each sample's loss.
    """

    x_nCHW: Tensor
    time_n: Tensor
    target_nCHW: Tensor
    weight_n: Tensor


class Objective:
    """The loss of a diffusion process: E weight(t) |F(c_in x_t, c_noise) - target|, squared for `l2` (Eq. 2).

    Args:
        times: gives the weights; None: the process does.
    """

    def __init__(self, process: Process, kind: LossKind = "l2", times: TrainingTimes | None = None) -> None:
        self.process, self.kind = process, kind
        self._times = times or TrainingTimes(process)

    def noised(self, x0_nCHW: Tensor, noise_nCHW: Tensor, t_n: Tensor) -> NoisedBatch:
        """The clean samples, noised by `noise_nCHW` to the times `t_n` in the process's unit (Eq. 1)."""
        x_t = self.process.perturb(x0_nCHW, noise_nCHW, t_n)
        x_in, time_n = self.process.network_input(x_t, t_n)
        target = self.process.target(x0_nCHW, noise_nCHW, t_n)
        return NoisedBatch(x_nCHW=x_in, time_n=time_n, target_nCHW=target, weight_n=self._times.weight(t_n))

    def losses(self, output_nCHW: Tensor, batch: NoisedBatch, rows: slice = slice(None)) -> Tensor:
        """Weighted loss of each sample, float32 [n], where the output is that for `rows` of the batch."""
        return batch.weight_n[rows] * sample_losses(output_nCHW, batch.target_nCHW[rows], self.kind)
