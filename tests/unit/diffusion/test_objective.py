"""The objective beside the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from msdiff_dist.diffusion.objective import Objective
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig, DiscreteProcess
from msdiff_dist.diffusion.processes.edm import EDMConfig, EDMProcess

X0, NOISE, OUTPUT = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_noise_prediction(kind: str) -> None:
    process = DiscreteProcess(DiscreteConfig())
    objective, t_n = Objective(process, kind), torch.tensor([0, 10, 500, 999])
    batch = objective.noised(X0, NOISE, t_n)
    a = torch.from_numpy(process.alphas_cumprod[t_n.numpy()]).float()[:, None, None, None]
    torch.testing.assert_close(batch.x_nCHW, a.sqrt() * X0 + (1 - a).sqrt() * NOISE)
    assert batch.time_n.tolist() == t_n.tolist()
    error = (OUTPUT - NOISE).abs() if kind == "l1" else (OUTPUT - NOISE) ** 2
    torch.testing.assert_close(objective.losses(OUTPUT, batch), error.mean((1, 2, 3)))


def test_edm_weighs_the_error_of_the_denoised_image() -> None:
    """Karras et al. 2022, Eq. 8: lambda(sigma) c_out^2 |F - (x_0 - c_skip (x_0 + n)) / c_out|^2, lambda c_out^2 = 1."""
    objective, sigma_n = Objective(EDMProcess(EDMConfig())), np.array([0.01, 0.4, 3.0, 70.0])
    batch = objective.noised(X0, NOISE, torch.from_numpy(sigma_n))
    s = torch.from_numpy(sigma_n).float()[:, None, None, None]
    total = s**2 + 0.25
    c_skip, c_out, c_in = 0.25 / total, s * 0.5 / total.sqrt(), 1 / total.sqrt()
    noisy = X0 + s * NOISE
    torch.testing.assert_close(batch.x_nCHW, c_in * noisy)
    torch.testing.assert_close(batch.time_n, torch.from_numpy(np.log(sigma_n) / 4).float())
    target = (X0.double() - c_skip.double() * noisy.double()) / c_out.double()
    expected = (OUTPUT.double() - target).square().mean((1, 2, 3)).float()
    torch.testing.assert_close(objective.losses(OUTPUT, batch), expected, rtol=1e-3, atol=1e-5)


def test_rows_are_a_part_of_the_batch() -> None:
    objective = Objective(DiscreteProcess(DiscreteConfig(prediction_type="v_prediction", min_snr_gamma=5.0)))
    batch = objective.noised(X0, NOISE, torch.tensor([3, 200, 600, 998]))
    rows = slice(1, 3)
    assert torch.equal(objective.losses(OUTPUT[rows], batch, rows), objective.losses(OUTPUT, batch)[rows])
