"""The table of checks, and the report that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from msdiff_dist.apps.doctor import cluster, devices, limits, software, storage
from msdiff_dist.apps.doctor.finding import Finding
from msdiff_dist.apps.doctor.probe import Answers, probe
from msdiff_dist.apps.verdict import worst

CHECKS: tuple[Callable[[Answers], Iterator[Finding]], ...] = (
    software.check_python,
    software.check_packages,
    software.check_imports,
    software.check_xformers,
    software.check_compilers,
    devices.check_driver,
    devices.check_visible,
    devices.check_gpus,
    devices.check_modes,
    devices.check_precision,
    devices.check_nccl,
    limits.check_cores,
    limits.check_memory,
    limits.check_shared_memory,
    limits.check_descriptors,
    cluster.check_slurm,
    cluster.check_interfaces,
    cluster.check_infiniband,
    cluster.check_nccl_variables,
)
"""In the order of the report. Each gives any number of findings; none where it does not apply."""

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def examine(folder: Path) -> list[Finding]:
    """What all checks find on this machine, with run folders in `folder`."""
    answers = probe()
    return [finding for check in (*CHECKS, *storage.checks_of(folder)) for finding in check(answers)]


def as_mapping(findings: list[Finding]) -> dict[str, Any]:
    """The report as JSON values: `status`, the gravest of all; `checks`; `versions`."""
    return {
        "status": worst(f.status for f in findings),
        "checks": [asdict(finding) for finding in findings],
        "versions": software.versions(),
    }


def render(findings: list[Finding]) -> RenderableType:
    """The report for a terminal: a line for each finding, its cure below it, and the count of what is not ok."""
    table = Table.grid(padding=(0, 2), expand=False)
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        words = Text(finding.found)
        if finding.cure:
            words.append(f"\n{finding.cure}", style="italic")
        table.add_row(Text(finding.status, style=_COLOURS[finding.status]), finding.name, words)
    counts = [f"{sum(f.status == status for f in findings)} {status}s" for status in ("problem", "warning")]
    return Group(table, Padding(Text(", ".join(counts)), (1, 0, 0, 0)))
