"""The diary of a run's starts and ends, from which a job decides to give up after starts without progress."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdiff_dist.config import from_mapping
from msdiff_dist.errors import ConfigError
from msdiff_dist.files.json_text import whole_lines


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a job.

    time: seconds since 1970. job: its id. ranks: world size. step: of the newest checkpoint at the start (0: none).
    outcome: `finished`, `preempted` or an error; None if nothing was recorded, as after a power cut, or while it runs.
    """

    time: float
    job: str
    ranks: int
    step: int
    outcome: str | None = None


class Diary:
    """`launch/starts.jsonl` of a run folder. A line is a start, written by rank 0, or an end, by it or a failed rank.

    A rank may fail before rank 0 has written the start, so both lines have the key of their start: job and number of
    requeues. A local job has no number of requeues: its later starts have the same key.
    """

    def __init__(self, path: Path, job: str = "", requeues: int = 0) -> None:
        self._path, self._job, self._key = path, job, f"{job}.{requeues}"

    def starts(self) -> list[Start]:
        """Every start so far, oldest first."""
        found: list[Start] = []
        newest: dict[str, int] = {}  # key -> place in `found` of the newest start with it
        early: dict[str, str] = {}  # key -> the outcome that came before the start
        # A line may be cut off by a crash of the node.
        for entry in whole_lines(self._path.read_bytes()) if self._path.exists() else []:
            key, outcome = entry.get("key"), entry.get("outcome")
            if not isinstance(key, str):
                continue
            if "step" in entry:
                try:
                    start = from_mapping(Start, {name: entry[name] for name in ("time", "job", "ranks", "step")})
                except (KeyError, ConfigError):  # of another program, or edited
                    continue
                found.append(dataclasses.replace(start, outcome=early.pop(key, None)))
                newest[key] = len(found) - 1
            elif not isinstance(outcome, str):
                continue
            elif key not in newest:
                early.setdefault(key, outcome)
            # The first rank to fail has the cause; later ones report what followed from it.
            elif found[newest[key]].outcome is None:
                found[newest[key]] = dataclasses.replace(found[newest[key]], outcome=outcome)
        return found

    def write_start(self, ranks: int, step: int, **more: Any) -> None:
        """Append a start at `step`; `more` are further JSON values of the line."""
        self._append({"key": self._key, "time": time.time(), "job": self._job, "ranks": ranks, "step": step, **more})

    def write_end(self, outcome: str, **more: Any) -> None:
        """Append how the start of this diary's key ended."""
        self._append({"key": self._key, "time": time.time(), "outcome": outcome, **more})

    def starts_without_progress(self, step: int, limit: int) -> str | None:
        """The reason to give up, or None. `step` is that of the newest checkpoint.

        It is time to give up when this job's last `limit` starts all began at `step`.
        """
        recent = [s for s in self.starts() if s.job == self._job][-limit:]
        if len(recent) < limit or any(s.step != step for s in recent):
            return None
        no_message = "ended without a message (node failure, out of memory, killed)"
        endings = "; ".join(s.outcome or no_message for s in recent)
        return (
            f"gave up after {limit} starts from step {step} which reached no new checkpoint: {endings}. "
            f"Read the logs, save more often (checkpoint.every) or allow more time, then launch again. "
            f"`max_restarts` in the cluster file is the limit."
        )

    def _append(self, entry: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A line cut off by a crash must not swallow this one.
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as f:
            f.write(("\n" if torn else "") + json.dumps(entry) + "\n")
            f.flush()
            os.fsync(f.fileno())
