"""What a launch leaves in a run folder to find its job again, and the state of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from msdiff_dist.config import from_mapping
from msdiff_dist.errors import ConfigError, RunFolderError
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.files.json_text import parse_mapping


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
        """The record in the run folder `folder`, None if nothing was launched there.

        Raises:
            RunFolderError: the file holds something else.
        """
        path = folder / "launch/job.json"
        if not path.is_file():
            return None
        try:
            record = from_mapping(JobRecord, parse_mapping(path.read_bytes()))
            if not record.job_ids:
                raise ValueError("names no job")
        except (ValueError, ConfigError) as e:
            raise RunFolderError(str(path), None, f"is no record of a job ({e})", "Launch the run again.") from None
        return record

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
