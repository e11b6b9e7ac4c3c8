"""Whole runs through the command: killed and resumed, sampled from, sharded and placed in several ways, failing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from msdiff_dist.apps.check import commands
from msdiff_dist.apps.check.findings import Bench, Finding
from msdiff_dist.checkpoint.compare import compare
from msdiff_dist.checkpoint.load import CheckpointReader

_RESUMED = 1e-6  # greatest relative difference of the weights; sums of atomic additions on GPUs vary
_LOSSES = 1e-5  # greatest relative difference of a loss between two layouts
_END_S = 60.0  # seconds in which a failing rank must end the job
_STEPS, _EVERY = 30, 10
_PREVIEW = ("preview.every=30", "preview.num=4", "preview.sampler.steps=4")


def resuming(bench: Bench) -> Iterator[Finding]:
    """A run killed without warning and resumed equals one that was not; its preview and samples are images."""
    group = "resuming"
    whole, killed = bench.folder / "whole", bench.folder / "killed"
    often = (f"train.steps={_STEPS}", f"checkpoint.every={_EVERY}")
    yield _ended(group, "train 30 steps", commands.train(bench, whole, *often, *_PREVIEW))
    saved = killed / "checkpoints" / f"step_{_EVERY:08d}"
    commands.train(bench, killed, *often, *_PREVIEW, until=saved.is_dir)
    done = len(_losses(killed))
    yield _ended(group, f"resume after a kill at step {done}", commands.train(bench, killed, *often, *_PREVIEW))
    last = f"checkpoints/step_{_STEPS:08d}"
    differences = list(compare(CheckpointReader(whole / last), CheckpointReader(killed / last)))
    for kind in sorted({d.kind for d in differences}):
        worst = max(d.relative for d in differences if d.kind == kind)
        yield Finding.within(
            group, f"the same `{kind}` as without a kill", {"difference": worst}, {"difference": _RESUMED}
        )
    yield _images(group, "preview", [whole / f"samples/step_{_STEPS:08d}.png"])
    out = bench.folder / "images"
    sampled = commands.msdiff(bench, "sample", str(whole), "--num", "4", "--steps", "4", "--out", str(out))
    yield _ended(group, "sample", sampled)
    yield _images(group, "samples", [out / f"{i:05d}.png" for i in range(4)])


def layouts(bench: Bench) -> Iterator[Finding]:
    """The losses are the same under every ZeRO level and placement."""
    group, steps = "layouts", 6
    ranks = min(2, torch.cuda.device_count()) if bench.on_gpu else 2
    short = (f"train.steps={steps}", "checkpoint.every=0")
    zero = {
        level: ("parallel.zero_shared=" + str(level), f"parallel.zero_decoders={min(level, 2)}") for level in (1, 2, 3)
    }
    crossed = "parallel.placement=[[0,1],[1,2]]"
    cases: dict[str, tuple[int, tuple[str, ...]]] = {"1 rank, ZeRO 1": (1, zero[1])}
    if ranks == 1:
        cases |= {f"1 rank, ZeRO {level}": (1, zero[level]) for level in (2, 3)}
    else:
        levels = (2,) if bench.small else (1, 2)
        cases |= {f"{ranks} ranks, ZeRO {level}": (ranks, zero[level]) for level in levels}
        cases |= {f"{ranks} ranks, overlapping groups, ZeRO 3": (ranks, (*zero[3], crossed))}
    reference: list[float] = []
    for number, (name, (nproc, changes)) in enumerate(cases.items()):
        run = bench.folder / f"layout_{number}"
        ended = commands.train(bench, run, *short, *changes, ranks=nproc)
        losses = _losses(run)
        if ended.status or len(losses) != steps:
            yield _ended(group, name, ended)
        elif not reference:
            reference = losses
            yield Finding(group=group, name=name, status="ok", found=f"loss {losses[0]:.4f} to {losses[-1]:.4f}")
        else:
            worst = max(abs(a / b - 1) for a, b in zip(losses, reference, strict=True))
            yield Finding.within(group, f"{name}: the same losses", {"difference": worst}, {"difference": _LOSSES})


def failure(bench: Bench) -> Iterator[Finding]:
    """An exception on one rank of two ends the job soon, with its traceback."""
    group, name = "failure", "an exception on one rank"
    enough = not bench.on_gpu or torch.cuda.device_count() > 1
    planted = ("extensions=[msdiff_dist.apps.check.planted_failure]", "metrics.sinks=[planted_failure]")
    run = bench.folder / "failing"
    ended = commands.train(bench, run, "train.steps=100000", "checkpoint.every=0", *planted, ranks=2, on_cpu=not enough)
    where = "" if enough else " (on CPU ranks: this machine has one GPU)"
    raised = run / "planted_failure_at"
    if not raised.exists():
        yield _ended(group, name, ended)
        return
    seconds = ended.at - float(raised.read_text())
    reported = "planted failure" in ended.output
    good = reported and ended.status != 0 and seconds < _END_S
    found = f"the job ended {seconds:.1f} s later{where}" + ("" if reported else ", without naming the exception")
    yield Finding(group=group, name=name, status="ok" if good else "problem", found=found, figures={"seconds": seconds})


def _ended(group: str, name: str, ended: commands.Ended) -> Finding:
    """A finding that is ok if the command succeeded; else it has the last lines of what it printed."""
    if ended.status == 0:
        return Finding(
            group=group, name=name, status="ok", found=f"{ended.seconds:.0f} s", figures={"seconds": ended.seconds}
        )
    tail = " | ".join(ended.output.strip().splitlines()[-5:])
    return Finding(group=group, name=name, status="problem", found=f"exit status {ended.status}: {tail}")


def _losses(run: Path) -> list[float]:
    """The loss of every step that the run has recorded."""
    metrics = run / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in metrics.read_text().splitlines()] if metrics.exists() else []


def _images(group: str, name: str, paths: list[Path]) -> Finding:
    """A finding that is ok if the files are images with more than one shade."""
    flat = []
    for path in paths:
        if not path.exists():
            return Finding(group=group, name=name, status="problem", found=f"{path.name} was not written")
        with Image.open(path) as image:
            low, high = image.convert("L").getextrema()
            flat += [path.name] if low == high else []
    found = f"of one colour: {', '.join(flat)}" if flat else f"{len(paths)} images"
    return Finding(group=group, name=name, status="problem" if flat else "ok", found=found)
