"""What a launch leaves in a run folder to find its job again, and the state of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from msdiff_dist.files.atomic import atomic_write


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """`launch/job.json` of a run folder: its newest job.

    run, logs: folders. job_ids: one, or those of a data job's parts that were submitted. submitted: seconds since 1970.
    parts: number of all parts of a data job, None for training.
    """

    run: str
    job_ids: list[str]
    executor: str
    logs: str
    submitted: float
    parts: int | None = None

    @staticmethod
    def load(folder: Path) -> JobRecord | None:
        """The record in the run folder `folder`, None if nothing was launched there."""
        path = folder / "launch/job.json"
        return JobRecord(**json.loads(path.read_text())) if path.is_file() else None

    def save(self) -> None:
        """Write the record to its run folder."""
        atomic_write(Path(self.run) / "launch/job.json", json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class JobState:
    """The state of a run's job, or of a run of `msdiff train`, which has none.

    state: SLURM's word, or RUNNING / ENDED without SLURM; of several jobs "3 RUNNING, 5 COMPLETED"; without a job
    RUNNING / FINISHED / STOPPED / FAILED. active: it runs or may still run. nodes: their number, "" if unknown. reason:
    why it waits or failed.
    """

    state: str
    active: bool
    nodes: str = ""
    reason: str = ""


def done_file(folder: Path, part: int) -> Path:
    """The file whose presence says that a part of a data job is done."""
    return folder / "parts" / f"{part:05d}.done"
