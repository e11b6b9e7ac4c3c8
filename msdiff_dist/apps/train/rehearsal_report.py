"""What the rehearsed ranks of a run did: whether their collectives can complete, how many, and of how many bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from msdiff_dist.apps.train.phases import Phase
from msdiff_dist.distributed.collective_order import RankCalls, find_disagreement
from msdiff_dist.distributed.collective_trace import Call
from msdiff_dist.distributed.groups import ROUTING, SHARED
from msdiff_dist.distributed.plan_report import size

START, FIRST_STEP, STEP, END = "start", "first step", "step", "end"
"""Parts of a rehearsal of a rank."""
AGREEMENT = "agreement"
"""Title of the reduction of what the ranks agree on, which is in the group of the shared part."""


@dataclass(frozen=True, kw_only=True)
class RehearsedRank:
    """What one rank did.

    Attributes:
        groups: title of each of its process groups, by the group's name.
        sizes: number of ranks of each, by title.
        calls: every collective from the making of its engines to the end of its second step.
    """

    rank: int
    groups: dict[str, str]
    sizes: dict[str, int]
    calls: list[Call]


def report(world_size: int, ranks: Sequence[RehearsedRank]) -> dict[str, Any]:
    """Whether the ranks' collectives can complete, and the most that any of them issues, as JSON values."""
    disagreement = find_disagreement([RankCalls(rank=r.rank, groups=r.groups, calls=r.calls) for r in ranks])
    steps = [[call for call in rank.calls if call.phase == STEP] for rank in ranks]
    return {
        "world_size": world_size,
        "orders_agree": disagreement is None,
        "disagreement": disagreement,
        "rehearsed": [rank.rank for rank in ranks],
        "ranks": {
            "collectives_per_step": max(map(len, steps)),
            "bytes_per_step": max(sum(call.bytes for call in calls) for calls in steps),
            "by_group": [_row(title, ranks) for title in _titles(ranks)],
        },
        "start": {"collectives": max(sum(call.phase == START for call in rank.calls) for rank in ranks)},
    }


def run_report(phases: Sequence[Phase], reports: Sequence[dict[str, Any]], whole: int) -> dict[str, Any]:
    """The report of the phase `whole`, in which all of the recipe's stages train, with those of all phases.

    `phases` has the report of each, with its `first` and `last` step and what it trains (`about`); it is empty for a
    run of one phase. `orders_agree` and `disagreement` are of all phases.
    """
    if len(phases) == 1:
        return reports[0] | {"phases": []}
    found = [
        {"first": phase.first, "last": phase.last, "about": phase.about} | of_phase
        for phase, of_phase in zip(phases, reports, strict=True)
    ]
    wrong = next((of_phase for of_phase in found if not of_phase["orders_agree"]), None)
    return reports[whole] | {
        "orders_agree": wrong is None,
        "disagreement": wrong and f"in steps {wrong['first']}-{wrong['last']}, {wrong['disagreement']}",
        "phases": found,
    }


def render(report: dict[str, Any], title: str) -> RenderableType:
    """The report as a table. If it has reports of `phases`, they are rows of another."""
    table = Table("group", "ranks", "calls", "bytes", "kinds", title=f"{title}: a step of {report['world_size']} ranks")
    for row in report["ranks"]["by_group"]:
        kinds = "  ".join(f"{count} {kind}" for kind, count in row["kinds"].items())
        table.add_row(row["group"], str(row["size"]), str(row["calls"]), size(row["bytes"]), kinds)
    ranks, total = report["ranks"], report["start"]["collectives"]
    if report["orders_agree"]:
        verdict = "the collectives of all ranks complete in whatever order the ranks arrive"
    else:
        verdict = f"[red]the ranks' collectives do not fit together[/]: {report['disagreement']}"
    return Group(
        table,
        *_phase_table(report),
        f"a rank issues at most {ranks['collectives_per_step']} collectives of {size(ranks['bytes_per_step'])} in a "
        f"step, and {total} at the start",
        f"rehearsed: ranks {', '.join(map(str, report['rehearsed']))}",
        verdict,
    )


def _phase_table(report: dict[str, Any]) -> list[Table]:
    if not report["phases"]:
        return []
    table = Table("steps", "trains", "ranks of the stages", "calls", "bytes", "at the start", "complete")
    for phase in report["phases"]:
        groups = [row for row in phase["ranks"]["by_group"] if row["group"].startswith("stage ")]
        table.add_row(
            f"{phase['first']}-{phase['last']}",
            phase["about"],
            "  ".join(f"{row['group'].removeprefix('stage ')}: {row['size']}" for row in groups),
            str(phase["ranks"]["collectives_per_step"]),
            size(phase["ranks"]["bytes_per_step"]),
            str(phase["start"]["collectives"]),
            "yes" if phase["orders_agree"] else "[red]no[/]",
        )
    return [table]


def _titles(ranks: Sequence[RehearsedRank]) -> list[str]:
    """Stages ascending, the shared part, routing, the agreement. A group of one rank has no calls."""
    found = {title for rank in ranks for title in (*rank.groups.values(), AGREEMENT)}
    rest = [title for title in (SHARED, ROUTING, AGREEMENT) if title in found]
    return sorted(found - {*rest}, key=lambda title: int(title.split()[1])) + rest


def _title(rank: RehearsedRank, call: Call) -> str:
    return call.label or rank.groups[call.group]


def _row(title: str, ranks: Sequence[RehearsedRank]) -> dict[str, Any]:
    """The most calls and bytes that a rank has under a title in a step."""
    of_rank = [[call for call in rank.calls if call.phase == STEP and _title(rank, call) == title] for rank in ranks]
    most = max(of_rank, key=len)
    return {
        "group": title,
        "size": max(rank.sizes.get(SHARED if title == AGREEMENT else title, 0) for rank in ranks),
        "calls": len(most),
        "bytes": max(sum(call.bytes for call in calls) for calls in of_rank),
        "kinds": dict(Counter(call.kind for call in most)),
    }
