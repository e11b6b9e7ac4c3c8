"""EDM's augmentation: what is described is what was done, as often as asked."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from msdiff_dist.diffusion.augmentation import (
    AUGMENT_LABELS,
    SYM6,
    AugmentationConfig,
    draw_transforms,
    resampled,
    transformed,
)
from msdiff_dist.errors import ConfigError

EDM_LABELS = [
    [1.0, 0.0, -0.98263, -0.0013, 0.0509, -0.5918, 1.10557, -0.05747, -1.01619],
    [1.0, 0.0, 1.17825, -1.84649, -0.53241, 0.22737, 0.0, 0.25079, -0.40377],
    [0.0, 1.0, 0.27315, -1.0024, -1.0, 0.39695, 1.516, 0.69518, -0.80689],
]
EDM_PIXELS = [
    [-0.75996, -0.79627, 0.21737, -0.1787],
    [0.83861, 0.17921, 0.32239, -0.89436],
    [0.10402, 0.38503, 0.23588, -0.21724],
]
ALWAYS, SOMETIMES, MIRROR_ONLY = (AugmentationConfig(probability=p) for p in (1.0, 0.12, 0.0))


def augment(
    x: torch.Tensor, config: AugmentationConfig, seed: int, batch: int, index: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    transforms = draw_transforms(config, seed, batch, index)
    return transformed(x, transforms), transforms.label_n


def images(n: int, size: int = 12) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def blob(n: int, x: float, y: float, size: int = 32) -> torch.Tensor:
    """Images with a round spot, of a standard deviation of 2 pixels, at (x, y) pixels from the centre, y downwards."""
    axis = torch.arange(size) - (size - 1) / 2
    spot = torch.exp(-((axis - x).square()[None, :] + (axis - y).square()[:, None]) / 8)
    return spot.expand(n, 1, size, size)


def moments(image_HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a spot lies, (x, y) in pixels from the centre, and its covariance."""
    axis = torch.arange(len(image_HW)) - (len(image_HW) - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    weight, places = (image_HW / image_HW.sum()).flatten(), torch.stack([x.flatten(), y.flatten()])
    mean = places @ weight
    return mean, (places - mean[:, None]) * weight @ (places - mean[:, None]).T


def only(columns: tuple[int, ...], n: int = 500) -> tuple[np.ndarray, torch.Tensor]:
    """Numbers of images whose description has only these columns, and the descriptions."""
    labels = draw_transforms(AugmentationConfig(probability=0.4), 2, 0, np.arange(n)).label_n
    others = [k for k in range(AUGMENT_LABELS) if k not in columns]
    chosen = (labels[:, others] == 0).all(1) & (labels[:, columns] != 0).any(1)
    assert chosen.sum() > 10
    return np.flatnonzero(chosen.numpy()), labels[chosen]


def moved(spot: torch.Tensor, index: np.ndarray) -> torch.Tensor:
    return augment(spot, AugmentationConfig(probability=0.4), 2, 0, index)[0][:, 0]


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


def test_the_filter_is_daubechies_with_six_vanishing_moments() -> None:
    """Its definition: orthonormal to its even shifts; the high-pass that mirrors it kills polynomials of degree 5."""
    taps = np.array(SYM6)
    for shift in range(6):
        assert taps[: 12 - 2 * shift] @ taps[2 * shift :] == pytest.approx(float(shift == 0), abs=1e-10)
    assert taps.sum() == pytest.approx(math.sqrt(2))
    k = np.arange(12) - 5.5
    for degree in range(6):
        assert ((-1) ** np.arange(12) * k**degree) @ taps == pytest.approx(0, abs=1e-6)


def test_translation_by_whole_pixels_mirrors_what_comes_in() -> None:
    x = images(1)
    inverse = torch.eye(3)[None].clone()
    inverse[0, 0, 2] = 2 * 2 / 12  # two of twelve pixels
    moved = resampled(x, inverse)
    torch.testing.assert_close(moved[..., :-2], x[..., 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[..., -2:], x[..., [10, 9]], rtol=0, atol=1e-5)


def test_beyond_the_mirrored_image_is_nothing() -> None:
    """A tenth as large: the image and its mirrored neighbours take 3 tenths of the width, 6 of 20 pixels."""
    small = resampled(torch.ones(1, 1, 20, 20), torch.diag(torch.tensor([10.0, 10.0, 1.0]))[None])[0, 0]
    torch.testing.assert_close(small[9:11, 9:11], torch.ones(2, 2), rtol=0, atol=0.05)
    assert small[:4].abs().max() < 1e-6
    assert small[:, 16:].abs().max() < 1e-6


def test_images_are_those_of_edms_code() -> None:
    """Values of NVlabs/edm's AugmentPipe with these parameters, one image after the other."""
    axis = torch.arange(8.0)
    x = torch.cos(axis[:, None] * axis / 3 + axis).expand(3, 1, 8, 8)
    y, labels = augment(x, ALWAYS, 3, 6, np.arange(3))
    torch.testing.assert_close(labels, torch.tensor(EDM_LABELS), rtol=0, atol=1e-5)
    pixels = y[:, 0, [0, 2, 4, 7], [0, 5, 3, 6]]
    torch.testing.assert_close(pixels, torch.tensor(EDM_PIXELS), rtol=0, atol=2e-5)


def test_a_spot_is_shifted_by_an_eighth_of_the_image_for_each_unit() -> None:
    index, labels = only((7, 8))
    inside = labels[:, 7:].abs().amax(1) < 2
    for image, label in zip(moved(blob(len(index), 0, 0), index)[inside], labels[inside], strict=True):
        torch.testing.assert_close(moments(image)[0], 32 / 8 * label[7:], rtol=0, atol=0.15)


def test_a_spot_turns_counterclockwise() -> None:
    index, labels = only((3, 4))
    for image, label in zip(moved(blob(len(index), 3, 0), index), labels, strict=True):
        cos, sin = (label[3:5] + torch.tensor([1.0, 0.0])).tolist()
        torch.testing.assert_close(moments(image)[0], torch.tensor([3 * cos, -3 * sin]), rtol=0, atol=0.2)


def test_a_spot_grows_away_from_the_centre() -> None:
    index, labels = only((2,))
    for image, label in zip(moved(blob(len(index), 3, -4), index), labels, strict=True):
        factor = 2 ** (0.2 * float(label[2]))
        place, covariance = moments(image)
        torch.testing.assert_close(place, factor * torch.tensor([3.0, -4.0]), rtol=0, atol=0.1)
        torch.testing.assert_close(covariance, factor**2 * 4 * torch.eye(2), rtol=0.1, atol=0.2)


def test_a_spot_is_squeezed_along_the_axis_of_its_description() -> None:
    """Of (w cos r, w sin r) the axis is at r counterclockwise; -w with r + pi has the same description."""
    index, labels = only((5, 6))
    diagonal = 0
    for image, label in zip(moved(blob(len(index), 0, 0), index), labels, strict=True):
        size, covariance = float(label[5:7].norm()), moments(image)[1]
        along, across = label[5:7] * torch.tensor([1.0, -1.0]) / size, label[5:7].flip(0) / size
        ratio = 4 ** (0.2 * size)
        found = float(along @ covariance @ along) / 4, float(across @ covariance @ across) / 4
        if label[6] == 0:  # along x, with the sign of w
            ratio **= math.copysign(1, label[5])
        elif found[0] < 1:
            ratio = 1 / ratio
        assert found == pytest.approx((ratio, 1 / ratio), rel=0.05, abs=0.03)
        assert float(along @ covariance @ across) == pytest.approx(0, abs=0.1)
        diagonal += float(label[5:7].abs().min()) > 0.3
    assert diagonal > 3, "axes whose sign shows"


@pytest.mark.parametrize("probability", [-0.1, 1.5, float("nan")])
def test_probability_must_be_one(probability: float) -> None:
    with pytest.raises(ConfigError, match="probability"):
        AugmentationConfig(probability=probability)
