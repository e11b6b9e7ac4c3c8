#!/usr/bin/env python
"""Kill a run repeatedly at random moments, and compare its result with that of an undisturbed run.

    python tools/fault_campaign.py OUT --kills 50 --steps 400

While the run starts, trains or saves, one rank is killed, or all are, or a signal asks the run to stop; then the same
command is given again. At the end the loss of every step must be recorded once, and losses and the last checkpoint's
parameters, averages and moments must be equal: bit for bit, or within 1e-5 with --elastic (other ranks, ZeRO levels or
accumulation at every start).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from msdiff_dist.checkpoint.compare import compare
from msdiff_dist.checkpoint.layout import complete_checkpoints, step_of
from msdiff_dist.checkpoint.load import CheckpointReader

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5
BASE = ["optimizer.eps=1e-6", "optimizer.lr=1e-4", "checkpoint.every=3", "checkpoint.keep_last=2"]
PLAIN = ["--nproc", "2"]
LAYOUTS = [
    PLAIN,
    ["--nproc", "1", "train.gradient_accumulation_steps=2"],
    ["--nproc", "3", "parallel.zero_shared=3"],
    ["--nproc", "2", "parallel.zero_shared=2", "parallel.zero_decoders=2"],
]
# Exit statuses that each fault may lead to. A fault may come after the end of the run (0), and a signal before the run
# has a handler for it (-signal).
ENDINGS = {
    "finished": (0,),
    "one rank killed": (1, 0),
    "all killed": (-signal.SIGKILL, 1, 0),
    "SIGTERM": (0, -signal.SIGTERM),
    "SIGUSR2": (0, -signal.SIGUSR2),
}


def start(run: Path, steps: int, layout: list[str]) -> subprocess.Popen[str]:
    """Start the training command."""
    command = [sys.executable, "-m", "msdiff_dist.cli.main", "train", str(ROOT / "recipes/debug.yaml")]
    command += [f"train.steps={steps}", "train.precision=fp32", *BASE, *layout, "--run-dir", str(run)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def steps_done(run: Path) -> int:
    """Lines in the run's metrics."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def steps_kept(run: Path) -> int:
    """Steps in the run's newest checkpoint."""
    return max(map(step_of, complete_checkpoints(run / "checkpoints")), default=0)


def unfinished_saves(run: Path) -> list[Path]:
    """Checkpoints that are being written, or were when the run ended."""
    return list((run / "checkpoints").glob(".step_*.partial"))


def ranks_of(run: Path) -> list[int]:
    """The processes of the run's ranks: those whose standard error is a rank's log."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and os.readlink(process / "fd/2").startswith(f"{run}/logs/rank_"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def disturb(run: Path, process: subprocess.Popen[str], draw: random.Random) -> str:
    """Wait for a random moment and cause a fault. Returns its name; `finished` if the run had ended before."""
    moment = draw.choices(["start", "step", "save"], [2, 5, 3])[0]
    if moment == "start":
        time.sleep(draw.uniform(0, 6))
    else:
        target = steps_done(run) + draw.randint(1, 10)
        while steps_done(run) < target and process.poll() is None:
            time.sleep(0.005)
        while moment == "save" and not unfinished_saves(run) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.01 if moment == "save" else 0.1))
    if process.poll() is not None:
        return "finished"
    fault = draw.choice(["one rank killed", "one rank killed", "all killed", "all killed", "SIGTERM", "SIGUSR2"])
    ranks = ranks_of(run)
    if fault == "all killed" or not ranks:
        fault = "all killed"
        for victim in [*ranks, process.pid]:
            _kill(victim, signal.SIGKILL)
    elif fault == "one rank killed":
        _kill(draw.choice(ranks), signal.SIGKILL)
    else:
        process.send_signal(signal.Signals[fault])
    return fault


def settle(run: Path, process: subprocess.Popen[str], fault: str) -> None:
    """Wait until the command and all ranks have ended, with an exit status that the fault may lead to."""
    _, message = process.communicate(timeout=3600 if fault == "finished" else 300)
    if process.returncode not in ENDINGS[fault]:
        raise SystemExit(f"after `{fault}` the command ended with status {process.returncode}:\n{message}")
    deadline = time.monotonic() + 60
    while left := ranks_of(run):
        if time.monotonic() > deadline:
            raise SystemExit(f"processes {left} still run after `{fault}`")
        time.sleep(0.05)


def check(run: Path, whole: Path, tolerance: float) -> float:
    """Compare the two runs; returns the greatest relative difference of any tensor."""
    lines, reference = ([json.loads(x) for x in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, whole))
    if [m["step"] for m in lines] != [m["step"] for m in reference]:
        raise SystemExit("steps are missing or repeated in metrics.jsonl")
    for m, expected in zip(lines, reference, strict=True):
        if abs(m["loss"] - expected["loss"]) > tolerance * abs(expected["loss"]):
            raise SystemExit(f"step {m['step']}: loss {m['loss']}, undisturbed {expected['loss']}")
    last = f"checkpoints/step_{len(lines):08d}"
    readers = [CheckpointReader(r / last) for r in (whole, run)]
    for reader in readers:
        reader.verify()
    worst = max(compare(*readers), key=lambda d: d.relative)
    if worst.relative > tolerance:
        raise SystemExit(f"{worst.kind} of {worst.name} differs by {worst.relative:.2g} of its greatest value")
    return worst.relative


def _kill(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def main() -> None:
    """Run the campaign; exit status 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="new folder for both runs")
    parser.add_argument("--kills", type=int, default=50, help="faults, signals among them")
    parser.add_argument("--steps", type=int, default=400, help="steps of both runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of faults and layouts")
    parser.add_argument("--elastic", action="store_true", help="another layout at every start")
    options = parser.parse_args()
    draw, out = random.Random(options.seed), options.out.resolve()
    whole, run = out / "whole", out / "disturbed"
    settle(whole, start(whole, options.steps, PLAIN), "finished")
    faults: Counter[str] = Counter()
    interrupted_saves, lost = 0, [0]
    while True:
        process = start(run, options.steps, draw.choice(LAYOUTS) if options.elastic else PLAIN)
        fault = disturb(run, process, draw) if faults.total() < options.kills else "finished"
        settle(run, process, fault)
        if fault == "finished":
            break
        faults[fault] += 1
        during_save = bool(unfinished_saves(run))
        interrupted_saves += during_save
        lost.append(max(steps_done(run) - steps_kept(run), 0))
        during = " during a save" if during_save else ""
        print(f"{faults.total()}: {fault} at step {steps_done(run)}{during}, {lost[-1]} steps lost", flush=True)
    worst = check(run, whole, TOLERANCE if options.elastic else 0.0)
    print(
        f"{dict(faults)}; {interrupted_saves} interrupted a save; steps lost: {sum(lost)}, at most {max(lost)} at once"
    )
    print(f"every step recorded once, greatest relative difference {worst:.2g}")
    if faults.total() < options.kills:
        raise SystemExit(f"the run finished after {faults.total()} of {options.kills} faults: give it more --steps")


if __name__ == "__main__":
    main()
