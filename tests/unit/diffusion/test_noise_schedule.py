"""Noise schedules, against diffusers."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest

from msdiff_dist.diffusion.noise_schedule import alphas_cumprod, betas


@pytest.mark.parametrize(
    ("name", "theirs"), [("scaled_linear", "scaled_linear"), ("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_schedules_agree_with_diffusers(name: str, theirs: str) -> None:
    reference = diffusers.DDPMScheduler(1000, beta_start=0.0015, beta_end=0.0195, beta_schedule=theirs)
    ours = betas(name, 1000, 0.0015, 0.0195)
    np.testing.assert_allclose(ours, reference.betas.numpy(), rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(alphas_cumprod(ours), reference.alphas_cumprod.numpy(), rtol=1e-3, atol=1e-7)


def test_alphas_cumprod_is_the_product() -> None:
    b = betas("linear", 7, 0.1, 0.4)
    assert alphas_cumprod(b)[4] == pytest.approx(np.prod([1 - b[i] for i in range(5)]))
