"""The logs of a run's ranks."""

from __future__ import annotations

import collections
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from msdiff_dist.errors import RunFolderError
from msdiff_dist.launch.plain_run import plain_logs
from msdiff_dist.launch.record import JobRecord
from msdiff_dist.launch.watch import is_active, states


def rank_logs(run: Path) -> dict[int, Path]:
    """The log of each rank, by rank: of the newest job, or of `msdiff train` where that has run since."""
    record, plain = JobRecord.load(run), plain_logs(run)
    if record is None:
        return plain
    folder, jobs = Path(record.logs), "|".join(map(re.escape, record.job_ids))
    names = os.listdir(folder) if folder.is_dir() else []
    found = {int(m[1]): folder / n for n in names if (m := re.fullmatch(rf"(?:{jobs})_(\d+)_log\.out", n))}
    if plain and not states([record])[0].active and _newest(plain) > _newest(found):
        return plain
    return dict(sorted(found.items()))


def _newest(logs: Mapping[int, Path]) -> float:
    return max((path.stat().st_mtime for path in logs.values()), default=0.0)


def log_texts(run: Path, rank: int | None, lines: int | None, follow: bool) -> Iterator[str]:
    """The ranks' logs, rank 0's first, each under a heading.

    Args:
        rank: only this one.
        lines: only so many last lines of each.
        follow: of one rank (0 unless `rank` is given), and then what it writes until the run has ended.

    Raises:
        RunFolderError: no log of this rank, or none at all.
    """
    logs = rank_logs(run)
    wanted = [rank] if rank is not None else [0] if follow else list(logs)
    if not logs or wanted[0] not in logs:
        had = f"there are logs of ranks {', '.join(map(str, logs))}" if logs else "no rank has written a log there"
        raise RunFolderError("RUN" if rank is None else "--rank", str(run) if rank is None else rank, had, "Try again.")
    for number in wanted:
        if len(wanted) > 1:
            yield f"==> rank {number}: {logs[number]} <==\n"
        with logs[number].open(errors="replace") as f:
            yield "".join(collections.deque(f, maxlen=lines))
            while follow and is_active(run):
                time.sleep(1)
                yield f.read()
            yield f.read()  # what was written between the last look and the end
