"""The tables of an ablation's report: what the variants are, their scores, and what they take to the baseline's."""

from __future__ import annotations

import math
from collections.abc import Iterator

from msdiff_dist.apps.ablation.config import LOSS, TENTHS, Level
from msdiff_dist.apps.ablation.quality import Reached
from msdiff_dist.apps.ablation.results import Results, higher_is_better, sign
from msdiff_dist.apps.report.tables import Table


def title(score: str) -> str:
    """A score's name for people: `FID, mobilenet` for `mobilenet/fid`."""
    space, _, value = score.rpartition("/")
    return "held-out loss" if score == LOSS else f"{value.upper() if len(value) < 5 else value}, {space}"


def tables(found: Results) -> Iterator[Table]:
    """All tables: the variants, then for each score the scores and the compute to the baseline's."""
    yield variants_table(found)
    for name in found.scores:
        yield from tables_of(found, name)


def tables_of(found: Results, score: str) -> Iterator[Table]:
    """The tables of one score."""
    yield score_table(found, score)
    if len(found.variants) > 1:
        yield compute_table(found, score)
    if any(score in of for others in found.last_of.values() for of in others.values()):
        yield baselines_table(found, score)
    if score == LOSS and any(found.tenths.values()):
        yield noise_table(found)


def variants_table(found: Results) -> Table:
    """Size, cost and length of the variants."""
    rows = []
    for variant in found.variants:
        costs = variant.first.costs
        rows.append([
            variant.name, f"{costs.costs.total_params / 1e6:.3f} M", f"{costs.gmacs(costs.interval_K):.4g}",
            f"{variant.first.steps[-1]:,}", f"{variant.petaflops_P[-1]:.4g}",
        ])  # fmt: skip
    return Table(title="", head=["variant", "parameters", "GMAC", "steps", "PFLOP"], rows=rows, notes=[])


def score_table(found: Results, name: str) -> Table:
    """Mean and standard deviation at each point, the best and the last."""
    baseline = found.baseline
    points = [f"at {petaflops / baseline.petaflops_P[-1]:.0%}" for petaflops in baseline.petaflops_P]
    rows = []
    for variant in found.variants:
        mean_P, std_P = variant.mean_P(name).tolist(), variant.std_P(name).tolist()
        rows.append([variant.name, *map(_cell, mean_P, std_P), _number(variant.best(name)), _number(mean_P[-1])])
    better = "higher" if higher_is_better(name) else "lower"
    note = f"{better.capitalize()} is better. {_seeds(found, name)}"
    return Table(title=title(name), head=["variant", *points, "best", "last"], rows=rows, notes=[note])


def compute_table(found: Results, name: str) -> Table:
    """The compute of each variant to each level, over that of the baseline."""
    rows, scores = [], dict[Level, str]()
    for variant in found.variants[1:]:
        reached = found.reached[variant.name][name]
        scores |= {at.level: _number(sign(name) * at.score) for at in reached}
        cells = [shown(at) for at in reached] or ["not yet known"] * len(found.config.levels)
        rows.append([variant.name, *cells])
    head = ["variant", *(f"{level_name(level)}: {scores.get(level, '?')}" for level in found.config.levels)]
    note = f"Compute over the baseline's ({found.baseline.name}) to the same score"
    resampled = any(at.resamples for of in found.reached.values() for at in of[name])
    interval = ", with 95 % intervals over seeds" if resampled else ""
    return Table(title=f"Compute to the baseline's {title(name)}", head=head, rows=rows, notes=[f"{note}{interval}."])


def baselines_table(found: Results, name: str) -> Table:
    """The compute of each variant to the last score of each further baseline, over that one's own."""
    rows = []
    for variant in found.variants:
        cells = []
        for baseline, of in found.last_of.items():
            at = of.get(variant.name, {}).get(name)
            cells.append("1" if variant.name == baseline else shown(at) if at else "not yet known")
        rows.append([variant.name, *cells])
    last = {v.name: _number(v.mean_P(name)[-1]) for v in found.variants}
    head = ["variant", *(f"{baseline}: {last[baseline]}" for baseline in found.last_of)]
    resampled = any(at[name].resamples for of in found.last_of.values() for at in of.values() if name in at)
    interval = ", with 95 % intervals over seeds" if resampled else ""
    note = f"Compute over that of the baseline in the column's head, to its last score{interval}."
    return Table(title=f"Compute to the last {title(name)} of other baselines", head=head, rows=rows, notes=[note])


def noise_table(found: Results) -> Table:
    """The compute of each variant to the baseline's last held-out loss, by noise level."""
    known = {name: reached for name, reached in found.tenths.items() if reached}
    rows = [
        [str(t + 1), _number(found.baseline.mean_P(tenth)[-1]), *(shown(reached[t]) for reached in known.values())]
        for t, tenth in enumerate(TENTHS)
    ]
    note = (
        f"Tenths of the training's distribution of times, from the data on: the held-out loss of {found.baseline.name} "
        "at its end, and the compute of the others to the same, over its own."
    )
    head = ["tenth", f"loss of {found.baseline.name}", *known]
    return Table(title="Compute to the baseline's last held-out loss, by noise", head=head, rows=rows, notes=[note])


def level_name(level: Level) -> str:
    """What a level is called: the best score, the last one, or that after a share of the budget."""
    return "best" if isinstance(level, str) else "last" if level == 1 else f"after {level:.0%}"


def shown(at: Reached) -> str:
    """A ratio with its interval: `0.62 (0.50 to 0.81)`, `> 1.2` where the level is not reached."""
    if at.ratio is not None:
        value = f"{at.ratio:.2f}"
    elif at.above is not None:
        value = f"> {at.above:.2f}, not reached"
    elif at.below is not None:
        value = f"< {at.below:.2f}, before the first point"
    else:
        value = "not known"
    if not at.resamples:
        return value
    ends = (at.low, at.high)
    if ends == (None, None):
        return f"{value} (any)"
    if at.high is None:
        return f"{value} (> {at.low:.2f})"
    return f"{value} (< {at.high:.2f})" if at.low is None else f"{value} ({at.low:.2f} to {at.high:.2f})"


def _seeds(found: Results, name: str) -> str:
    """How many seeds there are, and of which variants more or fewer are complete."""
    count = len(found.baseline.seeds)
    if count == 1:
        return "One seed: no standard deviation."
    note = f"Mean ± standard deviation over {count} seeds."
    open_ = [v for v in found.variants if len(v.curves(name).seeds) < count]
    if open_:
        note += " Complete so far: " + ", ".join(f"{v.name} {len(v.curves(name).seeds)}" for v in open_) + "."
    return note


def _cell(mean: float, std: float) -> str:
    return _number(mean) + ("" if math.isnan(std) else f" ± {std:.2g}")


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value + 0.0:.4g}"  # no negative zero
