"""The loss of each sample."""

from __future__ import annotations

import pytest
import torch

from msdiff_dist.diffusion.loss import sample_losses


@pytest.mark.parametrize(("kind", "power"), [("l2", 2), ("l1", 1)])
def test_losses_are_means_over_each_sample(kind: str, power: int) -> None:
    a, b = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    losses = sample_losses(a, b, kind)
    for i in range(5):
        assert losses[i].item() == pytest.approx(sum(abs(v) ** power for v in (a - b)[i].flatten().tolist()) / 48)


def test_half_precision_is_compared_in_float32() -> None:
    a = torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)
    losses = sample_losses(a, -a)
    assert losses.dtype == torch.float32
    assert losses.item() == 600.0**2
