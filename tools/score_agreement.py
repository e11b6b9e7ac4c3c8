"""Whether the held-out loss ranks models as other scores do: rank correlations over the checkpoints of ablations.

Example: python tools/score_agreement.py runs/efficiency/results.json runs/full/results.json --plot agreement.png

Prints a Markdown table with a row for every score but the held-out loss. Correlations are Spearman's, between how good
a checkpoint is by the one and by the other, whether a score is better high or low: 1 where both order all checkpoints
alike. `all` is over all checkpoints of all runs, most of which differ by how long they were trained; `last` over the
last checkpoint of each run. The interval is the 95 % percentile interval of a bootstrap that draws whole runs with
replacement. `seeds` is the range of the correlations over the checkpoints of each seed. Files are put together where
their scores are of the same held-out samples, images and features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from command import run
from numpy.typing import NDArray
from scipy.stats import spearmanr

from msdiff_dist.errors import DataError
from msdiff_dist.evaluation.scores import bootstrap_draw
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.files.json_text import read_mapping

LOSS = "loss"
RESAMPLES = 1000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """The checkpoints of one run that have both scores: losses and scores [P], both the better the lower."""

    variant: str
    seed: str
    loss_P: Floats
    score_P: Floats


@dataclass(frozen=True)
class Agreement:
    """Correlations of one score with the held-out loss, NaN where there are too few checkpoints.

    Attributes:
        interval: of `overall`.
        per_variant, per_seed: over the checkpoints of one variant or one seed.
    """

    score: str
    runs: list[Run]
    overall: float
    interval: tuple[float, float]
    last: float
    per_variant: dict[str, float]
    per_seed: dict[str, float]


def score_agreement(
    results: Annotated[list[Path], typer.Argument(help="Files results.json of `msdiff ablate`.")],
    plot: Annotated[Path | None, typer.Option(help="Write a scatter plot of the scores to this PNG file.")] = None,
) -> None:
    """Compare the order of checkpoints by held-out loss with that by other scores."""
    found = [agreement(score, runs) for score, runs in runs_of(results)]
    print(table(found), end="")
    if plot is not None:
        _plot(found, plot)


def runs_of(files: Sequence[Path]) -> list[tuple[str, list[Run]]]:
    """The runs of each score, with scores that do not compare apart from each other.

    Raises:
        DataError: a file is no result of an ablation, or has no held-out loss and another score.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for file in files:
        remedy = "Name a results.json of an ablation that was scored by loss and another metric."
        content = read_mapping(file, DataError, remedy, "RESULTS")
        try:
            scores = [name for name in content["scores"] if name != LOSS]
            if not scores or LOSS not in content["scores"]:
                raise DataError("RESULTS", str(file), "has no two scores to compare, one of them loss", remedy)
            for score in scores:
                about = [content["scores"][name]["about"] for name in (LOSS, score)]
                key = (score, json.dumps(about, sort_keys=True))
                groups.setdefault(key, []).extend(_runs(content, score, file.parent.name if len(files) > 1 else ""))
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise DataError("RESULTS", str(file), f"is no result of an ablation ({e!r})", remedy) from None
    return [(score, [run for run in runs if len(run.loss_P)]) for (score, _), runs in groups.items()]


def _runs(content: dict[str, Any], score: str, name: str) -> Iterator[Run]:
    sign = -1 if content["scores"][score]["higher_is_better"] else 1
    for variant, about in content["variants"].items():
        for seed, curve in about["seeds"].items():
            both = [np.array(curve["scores"][which], dtype=float) for which in (LOSS, score)]  # null becomes NaN
            known = ~np.isnan(both).any(axis=0)
            yield Run(f"{name} {variant}".strip(), seed, both[0][known], sign * both[1][known])


def agreement(score: str, runs: list[Run]) -> Agreement:
    """Correlations over the runs of one score."""
    drawn = [
        correlation([runs[i] for i in bootstrap_draw(0, draw, len(runs), len(runs))])
        for draw in range(RESAMPLES if len(runs) > 1 else 0)
    ]
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if not np.isnan(drawn).all() else (np.nan, np.nan)
    variants, seeds = (dict.fromkeys(getattr(run, of) for run in runs) for of in ("variant", "seed"))
    return Agreement(
        score=score,
        runs=runs,
        overall=correlation(runs),
        interval=(float(low), float(high)),
        last=correlation([Run(r.variant, r.seed, r.loss_P[-1:], r.score_P[-1:]) for r in runs]),
        per_variant={name: correlation([r for r in runs if r.variant == name]) for name in variants},
        per_seed={seed: correlation([r for r in runs if r.seed == seed]) for seed in seeds},
    )


def correlation(runs: Sequence[Run]) -> float:
    """Spearman's over all checkpoints of runs; NaN for fewer than three, or where all are equal."""
    loss_N, score_N = (np.concatenate([getattr(run, of) for run in runs]) for of in ("loss_P", "score_P"))
    if len(loss_N) < 3 or np.ptp(loss_N) == 0 or np.ptp(score_N) == 0:
        return float("nan")
    return float(spearmanr(loss_N, score_N).statistic)


def table(found: Sequence[Agreement]) -> str:
    """The Markdown table: a row for each score, with a column for each variant."""
    variants = list(dict.fromkeys(name for of in found for name in of.per_variant))
    head = ["score", "runs", "checkpoints", "all", "95 % interval", "last", "seeds", *variants]
    lines = [head, ["---"] * len(head)]
    for of in found:
        seeds = [value for value in of.per_seed.values() if not np.isnan(value)]
        lines.append([
            of.score, str(len(of.runs)), str(sum(len(run.loss_P) for run in of.runs)), _shown(of.overall),
            "" if np.isnan(of.interval[0]) else f"{of.interval[0]:.2f} to {of.interval[1]:.2f}", _shown(of.last),
            f"{min(seeds):.2f} to {max(seeds):.2f}" if seeds else "",
            *(_shown(of.per_variant.get(name, float("nan"))) for name in variants),
        ])  # fmt: skip
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _shown(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


def _plot(found: Sequence[Agreement], path: Path) -> None:
    from matplotlib.figure import Figure

    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(5 * columns, 4.2 * rows), layout="constrained")
    for i, of in enumerate(found):
        axes = figure.add_subplot(rows, columns, i + 1)
        for name in of.per_variant:
            own = [run for run in of.runs if run.variant == name]
            axes.scatter(*(np.concatenate([getattr(run, k) for run in own]) for k in ("loss_P", "score_P")), label=name)
        axes.set_xlabel("held-out loss")
        axes.set_ylabel(of.score if all((run.score_P >= 0).all() for run in of.runs) else f"{of.score}, or minus it")
        axes.set_title(f"Spearman's correlation {_shown(of.overall)}", fontsize="medium")
        axes.grid(alpha=0.3)
        if i == 0:
            axes.legend()
    atomic_write(path, lambda f: figure.savefig(f, format="png"))


if __name__ == "__main__":
    run(score_agreement)
