"""The HTML file of a report on runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from msdiff_dist.apps.report.charts import charts_of
from msdiff_dist.apps.report.pictures import Picture, sample_grids
from msdiff_dist.apps.report.render import render
from msdiff_dist.apps.report.run_data import RunData
from msdiff_dist.apps.report.strip import Strip
from msdiff_dist.apps.report.tables import (
    Table,
    differing,
    evaluation_table,
    history,
    plan_tables,
    summary,
)

if TYPE_CHECKING:
    from msdiff_dist.apps.report.nearest import Nearest

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the page shows of one run."""

    name: str
    summary: list[tuple[str, str]]
    plan: list[Table]
    evaluations: Table | None
    history: list[str]
    grids: list[Picture]
    strip: Strip | None
    nearest: Nearest | None
    problems: list[str] = field(default_factory=list)


def page(
    runs: Sequence[RunData],
    strips: Sequence[Strip | None] = (),
    nearest: Sequence[Nearest | None] = (),
    refresh_s: float = 0.0,
) -> str:
    """The report on one or several runs.

    Args:
        strips, nearest: for each run, or none at all.
        refresh_s: seconds after which the page asks its server whether there is more to show; 0: it has no server.
    """
    sections = [
        _section(run, strips[i] if strips else None, nearest[i] if nearest else None) for i, run in enumerate(runs)
    ]
    return render(
        "page.html",
        charts_of(runs),
        title=", ".join(run.name for run in runs),
        refresh_s=refresh_s,
        runs=sections,
        differing=differing(runs),
    )


def _section(run: RunData, strip: Strip | None, nearest: Nearest | None) -> Section:
    problems = list(run.problems)

    def tried(what: str, make: Callable[[], T], otherwise: T) -> T:
        try:
            return make()
        except Exception as e:  # a run folder may hold anything; the other sections are shown
            problems.append(f"{what} cannot be shown: {e}")
            return otherwise

    return Section(
        name=run.name,
        summary=tried("The summary", lambda: summary(run), []),
        plan=tried("The plan", lambda: plan_tables(run), []),
        evaluations=tried("The evaluations", lambda: evaluation_table(run), None),
        history=tried("The history", lambda: history(run), []),
        grids=sample_grids(run, problems),
        strip=strip,
        nearest=nearest,
        problems=problems,
    )
