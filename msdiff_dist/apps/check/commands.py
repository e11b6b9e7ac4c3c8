"""The `msdiff` command in a process of its own, as a user runs it, on the device that is checked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msdiff_dist.apps.check.findings import Bench
from msdiff_dist.shipped import find_shipped

DEBUG = find_shipped("debug").path
LIMIT_S = 300.0
"""Seconds after which a command of the check is killed: it hangs."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A command that has ended.

    Attributes:
        output: all that it printed.
        seconds: how long it took.
        at: when it ended, as time.time() counts.
    """

    status: int
    output: str
    seconds: float
    at: float


def msdiff(bench: Bench, *arguments: str, until: Callable[[], bool] | None = None, on_cpu: bool = False) -> Ended:
    """Run `msdiff` with these arguments.

    Args:
        until: kill it, with all its ranks, as soon as this is true.
        on_cpu: hide the GPUs from it.

    Raises:
        TimeoutError: it still ran after `LIMIT_S`.
    """
    hidden = {} if bench.on_gpu and not on_cpu else {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "msdiff_dist.cli.main", *arguments]
    start = time.monotonic()
    log = bench.folder / "output.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | hidden, start_new_session=True
        )
        try:
            while process.poll() is None:
                if until is not None and until():
                    break
                if time.monotonic() - start > LIMIT_S:
                    raise TimeoutError(f"msdiff {' '.join(arguments)} still runs after {LIMIT_S:.0f} s")
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(status=process.returncode, output=log.read_text(), seconds=time.monotonic() - start, at=time.time())


def train(
    bench: Bench,
    run: Path,
    *overrides: str,
    ranks: int = 1,
    until: Callable[[], bool] | None = None,
    on_cpu: bool = False,
) -> Ended:
    """`msdiff train` on the debug recipe, in float32."""
    arguments = ["train", str(DEBUG), "train.precision=fp32", *overrides, "--nproc", str(ranks), "--run-dir", str(run)]
    return msdiff(bench, *arguments, until=until, on_cpu=on_cpu)
