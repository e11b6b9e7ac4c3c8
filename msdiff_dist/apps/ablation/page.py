"""results.html of an ablation: its tables and charts in one file, made like the report on runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from msdiff_dist.apps.ablation.results import Results
from msdiff_dist.apps.ablation.tables import tables_of, title, variants_table
from msdiff_dist.apps.report.charts import Chart, Charts, Column, Series
from msdiff_dist.apps.report.render import render


def page(found: Results, name: str) -> str:
    """The page on an ablation of this name."""
    charts = charts_of(found)
    sections = [(score, title(score), list(tables_of(found, score))) for score in found.scores]
    return render(
        "ablation.html",
        charts,
        title=name,
        variants=variants_table(found),
        changes=[(v.name, found.config.variants[v.name]) for v in found.variants],
        scores=sections,
        config=found.config,
    )


def charts_of(found: Results) -> Charts:
    """For each score its curves over compute, a line with a band for each variant."""
    made = Charts()
    for v, variant in enumerate(found.variants):
        made.sources[f"variant{v}"] = {"petaflops": variant.petaflops_P.tolist()}
    for score in found.scores:
        series = []
        log = found.logarithmic(score)
        least = float(found.taken(score).min()) / 2 if log else -np.inf  # a band that a logarithmic axis can show
        for v, variant in enumerate(found.variants):
            mean_P, std_P = variant.mean_P(score), np.nan_to_num(variant.std_P(score))
            columns = made.sources[f"variant{v}"]
            for name, values in (("", mean_P), (" low", np.maximum(mean_P - std_P, least)), (" high", mean_P + std_P)):
                columns[score + name] = _column(values)
            line = Series(source=f"variant{v}", x="petaflops", y=score, label=variant.name, colour=v, style="dots")
            series += [replace(line, y=f"{score} high", base=f"{score} low", style="band"), line]
        made.charts.append(
            Chart(
                section=score,
                title=title(score),
                y_label=title(score),
                series=series,
                log=log,
                x_label="training PFLOP",
            )
        )
    return made


def _column(values: np.ndarray) -> Column:
    return [None if np.isnan(value) else float(f"{value:.6g}") for value in values]
