"""The results of an ablation as data: curves of every score and seed, and what each variant takes to the baseline's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from msdiff_dist.apps.ablation.config import LOSS, TENTHS, AblationConfig
from msdiff_dist.apps.ablation.plan import Trial
from msdiff_dist.apps.ablation.quality import Curves, Floats, Reached, compare
from msdiff_dist.apps.ablation.score_file import ScoreFile, json_values
from msdiff_dist.config import to_mapping
from msdiff_dist.evaluation.scores import METRICS

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One variant with its runs.

    Attributes:
        first: the trial of the first seed, for what all seeds share.
        seeds: S seeds. petaflops_SP: compute at the P points.
        scores: by name, scores [S, P] as they are, NaN where there is none yet; the held-out loss by tenths of times
            among them.
    """

    name: str
    first: Trial
    seeds: tuple[int, ...]
    petaflops_SP: Floats
    scores: dict[str, Floats]

    @property
    def petaflops_P(self) -> Floats:
        """Mean over the seeds."""
        mean: Floats = self.petaflops_SP.mean(axis=0)
        return mean

    def mean_P(self, score: str) -> Floats:
        """Mean over the seeds that have a score, NaN where none has."""
        return np.array([column.mean() if len(column) else np.nan for column in self._columns(score)])

    def std_P(self, score: str) -> Floats:
        """Sample standard deviation over the seeds that have a score, NaN for fewer than two."""
        return np.array([column.std(ddof=1) if len(column) > 1 else np.nan for column in self._columns(score)])

    def best(self, score: str) -> float:
        """The best of `mean_P`, NaN if there is none."""
        known = self.mean_P(score)
        known = known[~np.isnan(known)]
        return float(sign(score) * (sign(score) * known).min()) if len(known) else math.nan

    def curves(self, score: str) -> Curves:
        """The curves of the seeds that have all scores; lower is better."""
        complete = np.flatnonzero(~np.isnan(self.scores[score]).any(axis=1))
        return Curves(
            seeds=tuple(self.seeds[i] for i in complete),
            petaflops_SP=self.petaflops_SP[complete],
            score_SP=sign(score) * self.scores[score][complete],
        )

    def _columns(self, score: str) -> list[Floats]:
        return [column[~np.isnan(column)] for column in self.scores[score].T]


@dataclass(frozen=True, kw_only=True)
class Results:
    """All variants, the baseline first.

    Attributes:
        scores: names of the scores that were taken: `loss`, `mobilenet/fid`.
        reached: by variant other than the baseline, and score, what it takes to each level.
        last_of: by baseline of `config.baselines`, other variant and score, what it takes to the baseline's last score.
        tenths: by variant other than the baseline, what it takes to the baseline's last held-out loss in each tenth of
            times; empty where that was not taken, as by earlier versions.
    """

    config: AblationConfig
    variants: tuple[Variant, ...]
    scores: tuple[str, ...]
    reached: dict[str, dict[str, list[Reached]]]
    last_of: dict[str, dict[str, dict[str, Reached]]]
    tenths: dict[str, list[Reached]]

    @property
    def baseline(self) -> Variant:
        return self.variants[0]

    def taken(self, score: str) -> Floats:
        """All values of a score, in no particular order."""
        values: Floats = np.concatenate([variant.scores[score].ravel() for variant in self.variants])
        known: Floats = values[~np.isnan(values)]
        return known

    def logarithmic(self, score: str) -> bool:
        """Whether charts show a score on a logarithmic axis."""
        return not higher_is_better(score) and bool((self.taken(score) > 0).all())


def results(config: AblationConfig, trials: Sequence[Trial]) -> Results:
    """What was scored so far."""
    files = {(trial.variant, trial.seed): trial.scores() for trial in trials}
    values = {(t.variant, t.seed): [files[t.variant, t.seed].values(t.sets, step) for step in t.steps] for t in trials}
    # In the order of the first run's sets and metrics; a metric may give several scores.
    taken = tuple(dict.fromkeys(name for of_run in values.values() for at in of_run for name in at))
    variants = []
    for variant in dict.fromkeys(t.variant for t in trials):
        own = sorted((t for t in trials if t.variant == variant), key=lambda t: config.seeds.index(t.seed))
        scores = {
            name: np.array([[at.get(name, np.nan) for at in values[variant, t.seed]] for t in own]) for name in taken
        }
        variants.append(
            Variant(
                name=variant,
                first=own[0],
                seeds=tuple(t.seed for t in own),
                petaflops_SP=np.array([_petaflops(t, files[variant, t.seed]) for t in own]),
                scores=scores,
            )
        )
    names = tuple(name for name in taken if name not in TENTHS)
    baseline, others = variants[0], variants[1:]
    reached = {
        other.name: {name: compare(baseline.curves(name), other.curves(name), config.levels) for name in names}
        for other in others
    }
    tenths = {
        other.name: [at for name in TENTHS for at in _last(baseline, other, name)]
        for other in others
        if TENTHS[0] in taken
    }
    last_of = {
        name: {
            variant.name: {score: at for score in names for at in _last(other, variant, score)}
            for variant in variants
            if variant is not other
        }
        for name in config.baselines
        for other in [next(v for v in variants if v.name == name)]
    }
    return Results(
        config=config, variants=tuple(variants), scores=names, reached=reached, last_of=last_of, tenths=tenths
    )


def _last(baseline: Variant, variant: Variant, score: str) -> list[Reached]:
    """What a variant takes to the last score of a baseline; empty while no seed of both is complete."""
    return compare(baseline.curves(score), variant.curves(score), [1.0])


def higher_is_better(score: str) -> bool:
    """Whether a score of this name, as `mobilenet/recall`, is the better the higher it is."""
    value = score.rpartition("/")[2]
    return any(value in metric.higher_is_better for metric in METRICS.values())


def sign(score: str) -> int:
    """1, or -1 for scores of which higher ones are better."""
    return -1 if higher_is_better(score) else 1


def mapping(found: Results) -> dict[str, Any]:
    """The content of results.json, as docs/guides/ablations.md describes it."""
    return {
        "format": FORMAT,
        "baseline": found.baseline.name,
        "budget": found.config.budget,
        "points": list(found.config.points),
        "score": json_values(to_mapping(found.config.score)),
        "scores": {name: _about(name, found) for name in found.scores},
        "variants": {variant.name: _variant(variant, found) for variant in found.variants},
    }


def _about(score: str, found: Results) -> dict[str, Any]:
    """What a score depends on besides weights and seed: scores with the same `about` compare between ablations."""
    about = next(s.about for s in found.baseline.first.sets if s.prefix == score[: score.rfind("/") + 1])
    return {
        "higher_is_better": higher_is_better(score),
        "about": {key: value for key, value in about.items() if score == LOSS or key != "seed"},
    }


def _variant(variant: Variant, found: Results) -> dict[str, Any]:
    costs = variant.first.costs
    return {
        "changes": found.config.variants[variant.name],
        "params": costs.costs.total_params,
        "gmacs": costs.gmacs(costs.interval_K),
        "gmacs_sampling": costs.gmacs(costs.sampling_K),
        "step_petaflops": variant.first.step_petaflops,
        "seeds": {
            str(seed): {
                "steps": list(variant.first.steps),
                "petaflops": variant.petaflops_SP[s].tolist(),
                "scores": {name: _numbers(variant.scores[name][s]) for name in found.scores},
                "loss_per_tenth": [_numbers(variant.scores[name][s]) for name in TENTHS if name in variant.scores],
            }
            for s, seed in enumerate(variant.seeds)
        },
        "scores": {
            name: {
                "mean": _numbers(variant.mean_P(name)),
                "std": _numbers(variant.std_P(name)),
                "best": _numbers([variant.best(name)])[0],
                "last": _numbers(variant.mean_P(name))[-1],
                "levels": [_level(at, name) for at in found.reached.get(variant.name, {}).get(name, [])],
                "last_of": {
                    baseline: _level(of[variant.name][name], name)
                    for baseline, of in found.last_of.items()
                    if name in of.get(variant.name, {})
                },
            }
            for name in found.scores
        },
        "tenths": [_level(at, LOSS) for at in found.tenths.get(variant.name, [])],
    }


def _level(at: Reached, score: str) -> dict[str, Any]:
    return {
        **vars(at),
        "score": sign(score) * at.score + 0.0,  # no negative zero
        "seeds": list(at.seeds),
    }


def _numbers(values: Floats | list[float]) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in values]


def _petaflops(trial: Trial, file: ScoreFile) -> list[float]:
    return [file.petaflops.get(step, planned) for step, planned in zip(trial.steps, trial.petaflops, strict=True)]
