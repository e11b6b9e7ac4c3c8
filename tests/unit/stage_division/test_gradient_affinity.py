"""Similarity of gradients, against a backward pass for each time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msdiff_dist.diffusion.config import StagesConfig
from msdiff_dist.diffusion.objective import Objective
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig, DiscreteProcess
from msdiff_dist.diffusion.stage_partition import build_partition
from msdiff_dist.errors import ConfigError
from msdiff_dist.stage_division.gradient_affinity import gradient_affinity

PROCESS = DiscreteProcess(DiscreteConfig())
TIMES = [5, 300, 500, 700, 990]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 4, 3, padding=1)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor | None = None, label: Tensor | None = None
    ) -> tuple[Tensor]:
        return (torch.tanh(self.mix(x)) * (1 + t.view(-1, 1, 1, 1) / 1000),)


def build(stages: int) -> tuple[nn.Module, dict[int, nn.Module]]:
    torch.manual_seed(0)
    return Encoder(), {k: nn.Conv2d(4, 2, 1) for k in range(stages)}


@pytest.mark.parametrize("boundaries", [(), (442.0, 631.0)])
def test_affinity_is_the_cosine_of_gradients_that_times_share(boundaries: tuple[float, ...]) -> None:
    partition = build_partition(StagesConfig(boundaries=boundaries), PROCESS)
    shared, stages = build(partition.num_stages)
    x0, eps = torch.randn(2, 6, 2, 5, 5)
    affinity = gradient_affinity(shared, stages, Objective(PROCESS), partition, x0, eps, TIMES)
    gradients = []
    for t in TIMES:
        a = PROCESS.alphas_cumprod[t]
        stage = stages[sum(t >= b for b in boundaries)]
        features = shared(a**0.5 * x0 + (1 - a) ** 0.5 * eps, torch.full((6,), t))
        shared.zero_grad()
        stage.zero_grad()
        (stage(*features) - eps).square().mean().backward()
        common = [*shared.parameters(), *(() if boundaries else stage.parameters())]
        gradients.append(torch.cat([p.grad.flatten() for p in common]))
    naive = [[torch.cosine_similarity(g, h, dim=0).item() for h in gradients] for g in gradients]
    np.testing.assert_allclose(affinity, naive, atol=1e-5)


def test_stages_without_common_parameters_are_refused() -> None:
    partition = build_partition(StagesConfig(boundaries=(442.0,)), PROCESS)
    with pytest.raises(ConfigError, match="share no parameters"):
        gradient_affinity(
            nn.Identity(), build(2)[1], Objective(PROCESS), partition, *torch.randn(2, 2, 2, 5, 5), times=TIMES
        )
