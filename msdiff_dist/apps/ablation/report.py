"""The report on an ablation: one table as CSV and Markdown, one plot of quality against training compute."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msdiff_dist.apps.ablation.run import Trial
from msdiff_dist.files.atomic import atomic_write


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The scores of one variant over its P points and S seeds.

    first: the trial of the first seed, for what all seeds share. petaflops_P: training compute at each point. score_PS:
    scores, NaN where there is none yet.
    """

    first: Trial
    seeds: list[int]
    petaflops_P: np.ndarray
    score_PS: np.ndarray

    @property
    def mean_P(self) -> np.ndarray:
        """Mean over the seeds that have a score, NaN where none has."""
        # Not nanmean, which warns of rows without any score: a report on an unfinished ablation has such rows.
        count = (~np.isnan(self.score_PS)).sum(1)
        return np.where(count > 0, np.nansum(self.score_PS, 1) / np.maximum(count, 1), np.nan)

    @property
    def std_P(self) -> np.ndarray:
        """Sample standard deviation over the seeds that have a score, NaN for fewer than two."""
        count = (~np.isnan(self.score_PS)).sum(1)
        square = np.nansum((self.score_PS - self.mean_P[:, None]) ** 2, 1)
        return np.where(count > 1, np.sqrt(square / np.maximum(count - 1, 1)), np.nan)


def curves(trials: Sequence[Trial], settings: dict[str, Any]) -> list[Curve]:
    """One curve for each variant, in the order of the ablation file."""
    found = []
    for variant in dict.fromkeys(t.variant for t in trials):
        own = [t for t in trials if t.variant == variant]
        scores = [t.scores(settings) for t in own]
        table = np.array([[s.get(step, np.nan) for s in scores] for step in own[0].steps])
        petaflops = own[0].step_petaflops * np.array(own[0].steps)
        found.append(Curve(first=own[0], seeds=[t.seed for t in own], petaflops_P=petaflops, score_PS=table))
    return found


def compute_to_reach(target: float, petaflops_P: np.ndarray, score_P: np.ndarray) -> float | None:
    """The compute at which a curve, interpolated linearly between its points, first falls to `target`.

    That of the first point if it is already as good; None if the curve does not reach it.
    """
    for i, (at, score) in enumerate(zip(petaflops_P, score_P, strict=True)):
        if score <= target:
            before, worse = (petaflops_P[i - 1], score_P[i - 1]) if i else (at, score)
            share = (worse - target) / (worse - score) if worse > score else 0.0
            return float(before + share * (at - before))
    return None


def write_report(trials: Sequence[Trial], settings: dict[str, Any], out: Path) -> str:
    """Write results.csv, results.md and quality.png from the scores so far; returns the Markdown table."""
    found = curves(trials, settings)
    atomic_write(out / "results.csv", _csv(found))
    markdown = _markdown(found)
    atomic_write(out / "results.md", markdown)
    _plot(found, out / "quality.png")
    return markdown


def _csv(found: Sequence[Curve]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seeds = [f"score_seed_{seed}" for seed in found[0].seeds]
    writer.writerow(["variant", "params", "gmacs", "step", "petaflops", "score_mean", "score_std", *seeds])
    for curve in found:
        costs = curve.first.costs
        about = [curve.first.variant, costs.costs.total_params, costs.gmacs(costs.interval_K)]
        for p, step in enumerate(curve.first.steps):
            numbers = [curve.mean_P[p], curve.std_P[p], *curve.score_PS[p]]
            cells = ["" if np.isnan(n) else float(n) for n in numbers]
            writer.writerow([*about, step, float(curve.petaflops_P[p]), *cells])
    return text.getvalue()


def _markdown(found: Sequence[Curve]) -> str:
    baseline = found[0]
    target, whole = baseline.mean_P[-1], baseline.petaflops_P[-1]
    points = [f"at {petaflops / whole:.0%}" for petaflops in baseline.petaflops_P]
    header = ["variant", "parameters", "GMAC", "steps", "PFLOP", *points, "compute to baseline's last score"]
    lines = [header, ["---"] * len(header)]
    for curve in found:
        costs = curve.first.costs
        scores = [
            "" if np.isnan(mean) else f"{mean:.2f}" + ("" if np.isnan(std) else f" ± {std:.2f}")
            for mean, std in zip(curve.mean_P, curve.std_P, strict=True)
        ]
        reached = compute_to_reach(target, curve.petaflops_P, curve.mean_P)
        lines.append([
            curve.first.variant, f"{costs.costs.total_params / 1e6:.3f} M", f"{costs.gmacs(costs.interval_K):.4g}",
            str(curve.first.steps[-1]), f"{curve.petaflops_P[-1]:.4g}", *scores,
            "not reached" if reached is None else f"{reached / whole:.2f}",
        ])  # fmt: skip
    seeds = int((~np.isnan(baseline.score_PS[-1])).sum())
    note = f"Fréchet distance, mean ± standard deviation over {seeds} of {len(baseline.seeds)} seeds."
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + f"\n{note}\n"


def _plot(found: Sequence[Curve], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for curve in found:
        (line,) = axes.plot(curve.petaflops_P, curve.mean_P, "o-", label=curve.first.variant)
        spread = np.nan_to_num(curve.std_P)
        axes.fill_between(
            curve.petaflops_P, curve.mean_P - spread, curve.mean_P + spread, color=line.get_color(), alpha=0.2
        )
    axes.set_xlabel("training PFLOP")
    axes.set_ylabel("Fréchet distance")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    atomic_write(path, lambda f: figure.savefig(f, format="png"))
