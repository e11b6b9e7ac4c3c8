"""Reports are made and written: by `msdiff report`, and by training at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from msdiff_dist.apps.report.page import page
from msdiff_dist.apps.report.run_data import RunData, read_run
from msdiff_dist.apps.report.strip import Strip, denoising_strip, is_cheap
from msdiff_dist.errors import RunFolderError, UserError
from msdiff_dist.files.atomic import atomic_write

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


def report(
    folders: Sequence[Path], device: torch.device, strip: bool = False, nearest: int = 0, refresh_s: float = 0.0
) -> str:
    """The report on runs, as HTML.

    Args:
        strip: sample images to show the estimates of x0; otherwise only where that costs a second or two.
        nearest: samples of each run to compare with its training images; 0: none.
        refresh_s: as `page` has it.

    Raises:
        RunFolderError: a folder is no run's. Others: what was asked for cannot be computed.
    """
    runs = read_runs(folders)
    strips = [denoising_strip(run, device, _ROWS) if strip else _cheap_strip(run) for run in runs]
    if not nearest:
        return page(runs, strips, refresh_s=refresh_s)
    from msdiff_dist.apps.report.nearest import nearest_images  # its networks, which other reports do not need

    return page(runs, strips, [nearest_images(run, nearest, device) for run in runs], refresh_s)


def _cheap_strip(run: RunData) -> Strip | None:
    """A strip that costs little; without a checkpoint, or from a corrupt one, the report says why it has none."""
    try:
        return denoising_strip(run, torch.device("cpu"), 1) if run.last and is_cheap(run) else None
    except UserError as e:
        run.problems.append(f"No image was sampled: {e}")
        return None


def report_at_end(folder: Path) -> str:
    """Write RUN/report.html. A line for the user, which says what went wrong if it could not be written."""
    target = folder / NAME
    try:
        atomic_write(target, report([folder], torch.device("cpu")))
    except Exception as e:  # the run is trained and saved: nothing here is worth its exit status
        return f"no report: {type(e).__name__}: {e}; `msdiff report {folder}` writes it"
    return f"report: {target}"
