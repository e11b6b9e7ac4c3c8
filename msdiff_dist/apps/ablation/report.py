"""The report on an ablation: results.json with everything, tables as CSV and Markdown, charts as PNG and HTML."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from msdiff_dist.apps.ablation.config import AblationConfig
from msdiff_dist.apps.ablation.page import page
from msdiff_dist.apps.ablation.plan import Trial
from msdiff_dist.apps.ablation.results import Results, mapping, results
from msdiff_dist.apps.ablation.tables import tables, title
from msdiff_dist.apps.report.tables import Table
from msdiff_dist.files.atomic import atomic_write


def write_report(config: AblationConfig, trials: Sequence[Trial], out: Path) -> str:
    """Write results.json, .csv, .md, .html and quality.png from the scores so far; returns the Markdown."""
    found = results(config, trials)
    atomic_write(out / "results.json", json.dumps(mapping(found), indent=1, allow_nan=False) + "\n")
    atomic_write(out / "results.csv", _csv(found))
    markdown = "\n".join(_markdown(table) for table in tables(found))
    atomic_write(out / "results.md", markdown)
    atomic_write(out / "results.html", page(found, out.name))
    if found.scores:
        _plot(found, out / "quality.png")
    return markdown


def _csv(found: Results) -> str:
    """A row for each variant, score and point."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seeds = [f"seed_{seed}" for seed in found.baseline.seeds]
    writer.writerow(["variant", "params", "gmacs", "score", "step", "petaflops", "mean", "std", *seeds])
    for variant in found.variants:
        costs = variant.first.costs
        about = [variant.name, costs.costs.total_params, costs.gmacs(costs.interval_K)]
        for name in found.scores:
            mean_P, std_P = variant.mean_P(name), variant.std_P(name)
            for p, step in enumerate(variant.first.steps):
                numbers = [mean_P[p], std_P[p], *variant.scores[name][:, p]]
                cells = ["" if math.isnan(n) else float(n) for n in numbers]
                writer.writerow([*about, name, step, float(variant.petaflops_P[p]), *cells])
    return text.getvalue()


def _markdown(table: Table) -> str:
    heading = f"### {table.title}\n\n" if table.title else ""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    notes = "".join(f"\n{note}\n" for note in table.notes)
    return heading + "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + notes


def _plot(found: Results, path: Path) -> None:
    from matplotlib.figure import Figure

    columns = min(3, len(found.scores))
    rows = -(-len(found.scores) // columns)
    figure = Figure(figsize=(5.5 * columns + 0.5, 4.2 * rows), layout="constrained")
    for i, name in enumerate(found.scores):
        axes = figure.add_subplot(rows, columns, i + 1)
        for variant in found.variants:
            mean_P, std_P = variant.mean_P(name), np.nan_to_num(variant.std_P(name))
            (line,) = axes.plot(variant.petaflops_P, mean_P, "o-", label=variant.name)
            axes.fill_between(
                variant.petaflops_P, mean_P - std_P, mean_P + std_P, color=line.get_color(), alpha=0.2, linewidth=0
            )
        axes.set_xlabel("training PFLOP")
        axes.set_title(title(name), fontsize="medium")
        axes.grid(alpha=0.3, which="both")
        if found.logarithmic(name):
            axes.set_yscale("log")
        if i == 0:
            axes.legend()
    atomic_write(path, lambda f: figure.savefig(f, format="png"))
