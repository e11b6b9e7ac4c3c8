"""Measure the time from `msdiff launch` to the first training step on a SLURM cluster, without the wait in the queue,
and that of the same ranks started by `msdiff train` on this machine.

    python tools/bench_launch.py recipes/debug.yaml --cluster slurm/mine.yaml --folder /shared/bench
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

MSDIFF = [sys.executable, "-m", "msdiff_dist.cli.main"]


def first_step(run: Path, timeout_s: float) -> float:
    """Wait for the run's first step; returns the time in seconds since 1970."""
    metrics, end = run / "metrics.jsonl", time.time() + timeout_s
    while not (metrics.exists() and metrics.stat().st_size):
        if time.time() > end:
            sys.exit(f"no step in {timeout_s:g} s; see {run}/logs")
        time.sleep(0.05)
    return time.time()


def started(job_id: str) -> float:
    """The time at which SLURM started a job, in whole seconds since 1970."""
    text = subprocess.run(["scontrol", "show", "job", job_id, "-o"], capture_output=True, text=True, check=True).stdout
    at = re.search(r"StartTime=(\S+)", text)
    assert at
    return datetime.fromisoformat(at[1]).timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--cluster", required=True, help="cluster file")
    parser.add_argument("--folder", type=Path, required=True, help="new folder on the cluster's shared path")
    parser.add_argument("--timeout", type=float, default=600, help="seconds to wait for a first step")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)

    run = args.folder / "launched"
    begun = time.time()
    subprocess.run([*MSDIFF, "launch", args.recipe, "--cluster", args.cluster, "--run-dir", str(run)], check=True)
    stepped = first_step(run, args.timeout)
    job = json.loads((run / "launch/job.json").read_text())
    ranks = json.loads((run / "launch/starts.jsonl").read_text().splitlines()[0])["ranks"]
    queued = max(0.0, started(job["job_ids"][0]) - job["submitted"])
    subprocess.run([*MSDIFF, "cancel", str(run), "--now"], check=True)

    alone = args.folder / "local"
    local_begun = time.time()
    command = [*MSDIFF, "train", args.recipe, "--nproc", str(ranks), "--run-dir", str(alone)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as local:
        local_seconds = first_step(alone, args.timeout) - local_begun
        local.terminate()

    print(f"check, snapshot and submit      {job['submitted'] - begun:6.1f} s")
    print(f"queue                           {queued:6.1f} s, to the second")
    print(f"start of the job to first step  {stepped - job['submitted'] - queued:6.1f} s, {ranks} ranks")
    print(f"msdiff train to first step      {local_seconds:6.1f} s, {ranks} ranks on this machine")
    print(f"launch without the queue, over train: {(stepped - begun - queued) / local_seconds:.2f}")


if __name__ == "__main__":
    main()
