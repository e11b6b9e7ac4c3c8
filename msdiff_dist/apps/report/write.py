"""Reports are made and written: by `msdiff report`, and by training at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from msdiff_dist.apps.report.page import page
from msdiff_dist.apps.report.run_data import RunData, read_run
from msdiff_dist.apps.report.strip import Strip, denoising_strip, is_cheap
from msdiff_dist.checkpoint.layout import complete_checkpoints
from msdiff_dist.errors import RunFolderError, UserError
from msdiff_dist.files.atomic import atomic_write

if TYPE_CHECKING:
    from msdiff_dist.apps.report.nearest import Nearest

NAME = "report.html"
"""The file in a run folder that training writes at its end."""
_ROWS = 3  # images of a strip that was asked for


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """The runs in these folders, each under a name that no other has.

    Raises:
        RunFolderError: a folder is no run's.
    """
    for folder in folders:
        if not (folder / "recipe.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
            problem = "is no run folder: it has neither recipe.yaml nor metrics.jsonl"
            raise RunFolderError("RUN", str(folder), problem, "Name the folder of a run.")
    short = [folder.absolute().name for folder in folders]
    long = [os.path.relpath(folder, os.path.commonpath([f.absolute() for f in folders])) for folder in folders]
    names = [s if short.count(s) == 1 else path for s, path in zip(short, long, strict=True)]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


@dataclass(frozen=True)
class Request:
    """What a report is on.

    Attributes:
        folders: the runs.
        device: where images are sampled that were asked for.
        strip: sample images to show the estimates of x0; otherwise only where that costs a second or two.
        nearest: samples of each run to compare with its training images; 0: none.
        refresh_s: as `page` has it.
    """

    folders: Sequence[Path]
    device: torch.device
    strip: bool = False
    nearest: int = 0
    refresh_s: float = 0.0


@dataclass(frozen=True)
class Drawn:
    """What was sampled from a run's newest checkpoint, or why it could not be."""

    strip: Strip | None = None
    nearest: Nearest | None = None
    problem: str | None = None


def report(request: Request, kept: dict[Path, Drawn] | None = None) -> str:
    """The report on runs, as HTML.

    Args:
        kept: what was sampled before, by checkpoint; is added to. A served report samples a checkpoint once.

    Raises:
        RunFolderError: a folder is no run's. Others: what was asked for cannot be computed.
    """
    runs, kept = read_runs(request.folders), {} if kept is None else kept
    drawn = []
    for run in runs:
        newest = (complete_checkpoints(run.folder / "checkpoints") or [run.folder])[-1]
        if newest not in kept:
            kept[newest] = _drawn(run, request)
        drawn.append(kept[newest])
        if drawn[-1].problem:
            run.problems.append(f"No image was sampled: {drawn[-1].problem}")
    return page(runs, [found.strip for found in drawn], [found.nearest for found in drawn], request.refresh_s)


def _drawn(run: RunData, request: Request) -> Drawn:
    strip, nearest, problem = None, None, None
    if request.strip:
        strip = denoising_strip(run, request.device, _ROWS)
    elif run.last:
        try:
            strip = denoising_strip(run, torch.device("cpu"), 1) if is_cheap(run) else None
        except UserError as e:  # nobody asked for it: no checkpoint yet, or a corrupt one
            problem = str(e)
    if request.nearest:
        from msdiff_dist.apps.report.nearest import nearest_images  # its networks, which other reports do not need

        nearest = nearest_images(run, request.nearest, request.device)
    return Drawn(strip, nearest, problem)


def report_at_end(folder: Path) -> str:
    """Write RUN/report.html. A line for the user, which says what went wrong if it could not be written."""
    target = folder / NAME
    try:
        atomic_write(target, report(Request([folder], torch.device("cpu"))))
    except Exception as e:  # the run is trained and saved: nothing here is worth its exit status
        return f"no report: {type(e).__name__}: {e}; `msdiff report {folder}` writes it"
    return f"report: {target}"
