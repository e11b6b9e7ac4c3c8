"""Pixels as numbers."""

from __future__ import annotations

import torch

from msdiff_dist.pixels import centred, to_model_range, to_pixels, unit

LEVELS = torch.arange(256, dtype=torch.uint8)


def test_ranges() -> None:
    for dtype in (torch.float32, torch.float64):
        levels = LEVELS.to(dtype)
        assert (centred(levels).dtype, unit(levels).dtype) == (dtype, dtype)
        assert (centred(levels)[0], centred(levels)[-1], unit(levels)[0], unit(levels)[-1]) == (-1, 1, 0, 1)
        assert torch.allclose(unit(levels) * 2 - 1, centred(levels))


def test_pixels_scaled_and_latents_left_alone() -> None:
    assert torch.equal(to_model_range(LEVELS), centred(LEVELS.float()))
    latents = torch.tensor([2.5, -300.0], dtype=torch.float16)
    assert to_model_range(latents).dtype == torch.float32
    assert to_model_range(latents).tolist() == [2.5, -300]


def test_every_level_comes_back_and_others_go_to_the_nearest() -> None:
    assert torch.equal(to_pixels(to_model_range(LEVELS)), LEVELS)
    between = to_model_range(LEVELS)
    assert torch.equal(to_pixels(between + 0.4 / 127.5)[:-1], LEVELS[:-1])
    assert torch.equal(to_pixels(between - 0.4 / 127.5)[1:], LEVELS[1:])
    assert to_pixels(torch.tensor([-7.0, 1.5])).tolist() == [0, 255]
    assert to_pixels(torch.tensor([1.0], dtype=torch.bfloat16)).dtype == torch.uint8
