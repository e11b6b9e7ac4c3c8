"""Laws of the loss and designed stages, beside planted laws and a search through all designs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from msdiff_dist.stage_division.design import (
    LEAST_SHARE,
    DecoderChoice,
    DesignedStage,
    design_stages,
    predicted_loss,
)
from msdiff_dist.stage_division.loss_laws import LossLaws, Measurements, fit_laws

BINS = 10
RUNS = [(1.0, 1.0, 1.0), (1.0, 1.5, 1.0), (0.5, 1.0, 0.2), (1.0, 1.0, 0.2), (1.5, 1.0, 0.2)]  # width, depth, length


def _planted(bins: int = BINS) -> LossLaws:
    """Near the data a high floor, and much from width and from a decoder of its own; near the noise neither."""
    return LossLaws(
        floor_B=np.geomspace(0.3, 0.001, bins),
        scale_B=np.full(bins, np.log(0.6)),
        width_B=np.linspace(0.6, 0.1, bins),
        depth_B=np.full(bins, 0.2),
        samples_B=np.full(bins, 0.4),
        length_B=np.linspace(0.3, 0.0, bins),
        error=0.0,
    )


def _loss(laws: LossLaws, width: float, depth: float, samples: float, length: float) -> np.ndarray:
    """The documented formula, written out."""
    factor = width**-laws.width_B * depth**-laws.depth_B * samples**-laws.samples_B * length**laws.length_B
    found: np.ndarray = laws.floor_B + np.exp(laws.scale_B) * factor
    return found


def _measure(laws: LossLaws, noise: float) -> Measurements:
    rng = np.random.default_rng(0)
    rows = [(*run, samples) for run in RUNS for samples in np.linspace(300, 3000, 10)]
    losses = [
        _loss(laws, w, d, n, length) * np.exp(rng.normal(0, noise, len(laws.floor_B))) for w, d, length, n in rows
    ]
    width, depth, length, samples = np.array(rows).T
    return Measurements(
        width_N=width,
        depth_N=depth,
        samples_NB=np.repeat(samples[:, None], len(laws.floor_B), 1),
        length_N=length,
        loss_NB=np.array(losses),
    )


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.02), (0.01, 0.15)])
def test_the_laws_predict_what_was_not_measured(noise: float, tolerance: float) -> None:
    laws = _planted()
    fitted = fit_laws(_measure(laws, noise))
    for width, length, samples in ((1.25, 0.2, 3000.0), (0.75, 0.5, 10_000.0), (1.0, 1.0, 10_000.0)):
        found = fitted.loss(slice(0, BINS), width=width, depth=1.0, samples=np.array(samples), length=length)
        np.testing.assert_allclose(found, _loss(laws, width, 1.0, samples, length), rtol=tolerance)
    assert fitted.error == pytest.approx(noise, abs=0.003)


def test_more_width_never_makes_a_prediction_worse() -> None:
    measured = _measure(_planted(), 0.0)
    harmful = np.where(measured.width_N[:, None] > 1, measured.loss_NB * 1.5, measured.loss_NB)
    fitted = fit_laws(
        Measurements(
            width_N=measured.width_N,
            depth_N=measured.depth_N,
            samples_NB=measured.samples_NB,
            length_N=measured.length_N,
            loss_NB=harmful,
        )
    )
    assert (fitted.width_B >= 0).all()


CHOICES = [DecoderChoice(channels=c, width=c / 32, depth=1.0, macs=0.3 + (c / 32) ** 2) for c in (16, 32, 48)]


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_no_other_division_does_better(stages: int) -> None:
    """All divisions of six bins, all decoders and shares in steps of a sixteenth."""
    laws, budget = _planted(6), 30_000.0
    designed = design_stages(laws, CHOICES, budget, stages)
    best = np.inf
    for inner in itertools.combinations(range(1, 6), stages - 1):
        edges = (0, *inner, 6)
        for decoders in itertools.product(CHOICES, repeat=stages):
            for parts in itertools.product(range(1, 17), repeat=stages - 1):
                last = 16 - sum(parts)
                if last < 1:
                    continue
                trial = [
                    DesignedStage(first=a, last=b, decoder=d, share=p / 16)
                    for a, b, d, p in zip(edges, edges[1:], decoders, (*parts, last), strict=False)
                ]
                best = min(best, predicted_loss(laws, trial, budget))
    assert designed.predicted_loss <= best * (1 + 1e-4)
    assert predicted_loss(laws, designed.stages, budget) == pytest.approx(designed.predicted_loss)


def test_a_design_spends_the_budget_and_has_wide_decoders_near_the_data() -> None:
    budget = 1e6
    designed = design_stages(_planted(), CHOICES, budget, 3)
    assert sum(s.share for s in designed.stages) == pytest.approx(1)
    assert min(s.share for s in designed.stages) >= LEAST_SHARE - 1e-9
    spent = designed.samples * sum(s.share * s.decoder.macs for s in designed.stages)
    assert spent == pytest.approx(budget)
    assert [s.first for s in designed.stages] == [0, *(s.last for s in designed.stages[:-1])]
    assert designed.stages[-1].last == BINS
    widths = [s.decoder.channels for s in designed.stages]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]


def test_the_prediction_is_the_mean_of_the_documented_formula() -> None:
    laws, budget = _planted(), 5000.0
    halves = [DesignedStage(first=5 * k, last=5 * k + 5, decoder=CHOICES[2 - k], share=0.25 + 0.5 * k) for k in (0, 1)]
    samples = budget / (0.25 * CHOICES[2].macs + 0.75 * CHOICES[1].macs)
    near = _loss(laws, 1.5, 1.0, samples * 0.25 / 5, 0.5)[:5]
    far = _loss(laws, 1.0, 1.0, samples * 0.75 / 5, 0.5)[5:]
    assert predicted_loss(laws, halves, budget) == pytest.approx((near.sum() + far.sum()) / 10)
