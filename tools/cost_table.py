"""The paper's Table 2 computed from recipes: the training compute of each, compared with its unified baseline.

    python tools/cost_table.py recipes/*.yaml

The baseline of `NAME_3stage...` is `NAME_unified`. GMAC is of one evaluation, with stages weighted by interval length.
The paper's PFLOP do not count the batch (steps x GMAC). "all" counts every sample, two operations for each
multiply-add, and a backward pass twice the forward's.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from msdiff_dist.apps.train.costs import CostReport, cost_report
from msdiff_dist.recipe import Recipe, load_recipe

HEADER = ["recipe", "parameters", "steps", "GMAC", "paper's PFLOP", "of baseline", "PFLOP, all"]


def table(recipes: list[Recipe]) -> list[list[str]]:
    """One row of text for each recipe, sorted by group, the baseline of each group first."""
    reports = {recipe.name: cost_report(recipe) for recipe in recipes}
    baselines = {group(name): report for name, report in reports.items() if "_unified" in name}
    order = sorted(reports, key=lambda name: (group(name), "_unified" not in name, name))
    return [row(name, reports[name], baselines.get(group(name))) for name in order]


def group(name: str) -> str:
    """The beginning that a recipe's name has in common with its baseline's."""
    return re.split(r"_(?:unified|\d+stage)", name)[0]


def row(name: str, report: CostReport, baseline: CostReport | None) -> list[str]:
    """The cells of one recipe, in the order of `HEADER`; empty where a figure does not exist."""
    ratio = "" if baseline is None else f"{report.paper_petaflops / baseline.paper_petaflops:.0%}"
    return [
        name,
        f"{report.costs.total_params / 1e6:.2f} M",
        str(report.steps),
        f"{report.gmacs(report.interval_K):.2f}",
        f"{report.paper_petaflops:.2f}",
        ratio,
        "" if report.petaflops is None else f"{report.petaflops:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE")
    rows = table([load_recipe(path) for path in parser.parse_args().recipes])
    widths = [max(len(cells[i]) for cells in [HEADER, *rows]) for i in range(len(HEADER))]
    for cells in [HEADER, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |")


if __name__ == "__main__":
    main()
