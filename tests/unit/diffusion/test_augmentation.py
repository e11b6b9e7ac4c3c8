"""EDM's augmentation: what is described is what was done, as often as asked."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from msdiff_dist.diffusion.augmentation import (
    AUGMENT_LABELS,
    AugmentationConfig,
    draw_transforms,
    resampled,
    transformed,
)
from msdiff_dist.errors import ConfigError

ALWAYS, SOMETIMES, MIRROR_ONLY = (AugmentationConfig(probability=p) for p in (1.0, 0.12, 0.0))


def augment(
    x: torch.Tensor, config: AugmentationConfig, seed: int, batch: int, index: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    transforms = draw_transforms(config, seed, batch, index)
    return transformed(x, transforms), transforms.label_n


def images(n: int, size: int = 12) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def smooth(n: int, size: int = 32) -> torch.Tensor:
    """Images that interpolation does not change much."""
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.stack([torch.sin(2 * x + k), torch.cos(y - k), x * y]) for k in range(n)])


def matrix(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([[*rows[0], 0.0], [*rows[1], 0.0], [0.0, 0.0, 1.0]])[None]


def test_an_image_depends_on_seed_step_and_index_alone() -> None:
    x, index = images(6), np.array([3, 4, 7, 20, 21, 40])
    together, labels = augment(x.clone(), ALWAYS, 5, 9, index)
    for rows in (slice(0, 2), slice(2, 6)):
        part, part_labels = augment(x[rows].clone(), ALWAYS, 5, 9, index[rows])
        torch.testing.assert_close(part, together[rows], rtol=0, atol=1e-6)
        assert torch.equal(part_labels, labels[rows])
    assert not torch.equal(augment(x.clone(), ALWAYS, 6, 9, index)[1], labels)
    assert not torch.equal(augment(x.clone(), ALWAYS, 5, 10, index)[1], labels)


def test_what_is_described_as_untouched_is_untouched() -> None:
    x = images(300)
    y, labels = augment(x.clone(), SOMETIMES, 0, 0, np.arange(300))
    assert labels.shape == (300, AUGMENT_LABELS)
    untouched = (labels == 0).all(1)
    assert 60 < untouched.sum() < 120, "half of 0.88^5"
    assert torch.equal(y[untouched], x[untouched])
    assert all(not torch.equal(a, b) for a, b in zip(y[~untouched], x[~untouched], strict=True))


def test_flips_are_exact_and_described() -> None:
    x = images(200)
    y, labels = augment(x.clone(), MIRROR_ONLY, 0, 0, np.arange(200))
    mirrored = labels[:, 0].bool()
    assert 70 < mirrored.sum() < 130
    assert torch.equal(y[mirrored], x[mirrored].flip(3))
    assert torch.equal(y[~mirrored], x[~mirrored])
    assert torch.count_nonzero(labels[:, 1:]) == 0


def test_each_transform_happens_as_often_as_asked() -> None:
    _, labels = augment(torch.zeros(4000, 1, 2, 2), SOMETIMES, 1, 2, np.arange(4000))
    happened = [labels[:, 1], labels[:, 2], labels[:, 4], labels[:, 5], labels[:, 7], labels[:, 8]]
    expected = [0.06, *[0.12] * 5]
    for column, probability in zip(happened, expected, strict=True):
        assert float((column != 0).float().mean()) == pytest.approx(probability, abs=0.02)
    assert float((labels[:, 0] != 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(labels[:, 7] != 0, labels[:, 8] != 0), "one translation along both axes"


def test_descriptions_follow_their_distributions() -> None:
    _, labels = augment(torch.zeros(4000, 1, 2, 2), ALWAYS, 3, 4, np.arange(4000))
    for column in (2, 7, 8):
        assert float(labels[:, column].mean()) == pytest.approx(0, abs=0.05)
        assert float(labels[:, column].std()) == pytest.approx(1, abs=0.05)
    angle = torch.atan2(labels[:, 4], labels[:, 3] + 1)
    torch.testing.assert_close(labels[:, 4].square() + (labels[:, 3] + 1).square(), torch.ones(4000))
    assert float(angle.std()) == pytest.approx(math.pi / math.sqrt(3), abs=0.05)
    assert float(labels[:, 5:7].square().sum(1).mean()) == pytest.approx(1, abs=0.1)
    assert float((labels[:, 6] == 0).float().mean()) == pytest.approx(0.5, abs=0.03), "half are along the axes"


def test_resampling_at_the_same_places_changes_nothing() -> None:
    x = images(2)
    torch.testing.assert_close(resampled(x, torch.eye(3).expand(2, 3, 3)), x, rtol=0, atol=1e-5)


def test_quarter_turns_are_exact() -> None:
    x = images(1)
    turned = resampled(x, matrix([[0.0, -1.0], [1.0, 0.0]]))
    torch.testing.assert_close(turned, x.rot90(1, (2, 3)), rtol=0, atol=1e-5)


def test_translation_by_whole_pixels_mirrors_what_comes_in() -> None:
    x = images(1)
    inverse = torch.eye(3)[None].clone()
    inverse[0, 0, 2] = 2 * 2 / 12  # two of twelve pixels
    moved = resampled(x, inverse)
    torch.testing.assert_close(moved[..., :-2], x[..., 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[..., -2:], x[..., [11, 10]], rtol=0, atol=1e-5)


def test_pixels_move_as_described() -> None:
    """Away from the border, a smooth function of the position is the function of the moved position."""
    n, size = 40, 32
    y, labels = augment(smooth(1, size).repeat(n, 1, 1, 1), ALWAYS, 7, 0, np.arange(n))
    axis = torch.linspace(-1, 1, size) * (size - 1) / size  # pixel centres in half widths
    k, checked = size / (size - 1), 0
    for i in range(n):
        mirrored, upside_down, scale, cos_1, sin, a_cos, a_sin, *shift = labels[i].double().tolist()
        turn = np.array([[cos_1 + 1, -sin], [sin, cos_1 + 1]])
        c, s = np.array([a_cos, a_sin]) / math.hypot(a_cos, a_sin)
        frame = np.array([[c, -s], [s, c]])
        for row, column in ((10, 13), (16, 16), (20, 11)):
            target = np.array([float(axis[column]), float(axis[row])]) - 0.25 * np.array(shift)
            errors = []
            for sign in (
                1,
                -1,
            ):  # EDM's description is the same for a squeeze and for its inverse along the reversed axis
                ratio = 2 ** (0.2 * sign * math.hypot(a_cos, a_sin))
                forward = frame @ np.diag([ratio, 1 / ratio]) @ frame.T @ turn * 2 ** (0.2 * scale)
                sx, sy = np.linalg.solve(forward, target)
                inside = max(abs(sx), abs(sy)) < 0.9
                sx, sy = (-sx if mirrored else sx), (-sy if upside_down else sy)
                expected = np.array([math.sin(2 * k * sx), math.cos(k * sy), k * k * sx * sy])
                errors.append(np.abs(y[i, :, row, column].double().numpy() - expected).max() if inside else 0.0)
            assert min(errors) < 0.02
            checked += min(errors) > 0
    assert checked > n


@pytest.mark.parametrize("probability", [-0.1, 1.5, float("nan")])
def test_probability_must_be_one(probability: float) -> None:
    with pytest.raises(ConfigError, match="probability"):
        AugmentationConfig(probability=probability)
