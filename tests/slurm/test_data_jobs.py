"""Data jobs as arrays: parts that were killed or cancelled are resumed, and the result is that of one process."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from msdiff_dist.convert.formats.export_folder import write_export
from msdiff_dist.convert.model_weights import ModelWeights
from msdiff_dist.convert.tensor_sources import MemorySource
from msdiff_dist.data.make.datasets import prepare
from msdiff_dist.export.description import describe
from msdiff_dist.models import build_model
from msdiff_dist.recipe import load_recipe, recipe_mapping
from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import ClusterFile, Msdiff

pytestmark = pytest.mark.slurm
QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def wait_for(ready: Callable[[], object], pause: float = 0.02) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < end
        time.sleep(pause)


def command_of(*words: str) -> int | None:
    """The process on this machine whose command line holds all `words`."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if all(word.encode() in command for word in words):
                return int(folder.name)
    return None


@pytest.mark.slow
def test_parts_that_were_stopped_resume_to_what_one_process_makes(
    slurm: SlurmCluster, cluster_file: ClusterFile, msdiff: Msdiff, tmp_path: Path
) -> None:
    digits, export = tmp_path / "digits", tmp_path / "export"
    prepare("digits", digits, None, "train", 6)
    small = ["model.encoder_channels=16", "model.decoder_channels=[24,16,8]", f"data.shards={digits}"]
    small += ["train.precision=fp32"]
    recipe = load_recipe(QUICKSTART, small)
    description = replace(describe(recipe_mapping(recipe), 0), weights="raw")
    write_export(
        ModelWeights(description=description, tensors=MemorySource(build_model(recipe.model).state_dict())), export, {}
    )
    (tmp_path / "mine.yaml").write_text(QUICKSTART.read_text())

    encode = ["data", "encode", QUICKSTART, *small, "encode.measure_scale=true", "encode.batch_size=1"]
    sample = ["sample", export, "--raw", "--num", 120, "--batch-size", 2, "--steps", 4]
    part = ["--part", "{part}", "--parts", "{parts}"]
    latents, images = tmp_path / "latents", tmp_path / "images"
    jobs = {
        "encode": [2, *encode, *part, "--out", latents],
        "sample": [2, *sample, *part, "--out", images],
        "stages": [1, "stages", "cluster", "--data", digits, "--samples", 50, "--write", tmp_path / "mine.yaml"],
    }

    def submit(name: str) -> list[str]:
        parts, *command = jobs[name]
        array = ["array", "--parts", parts, "--cluster", cluster_file(), "--folder", tmp_path / name, "--", *command]
        status, printed = msdiff(*array)
        assert status == 0, printed
        return json.loads((tmp_path / name / "launch/job.json").read_text())["job_ids"]

    submitted = {name: submit(name) for name in jobs}
    wait_for(lambda: command_of("encode", "--part", "1"))
    process = command_of("encode", "--part", "1")
    assert process
    wait_for(lambda: (latents / ".encode/00001.json").exists(), pause=0.001)
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: len(list(images.glob("[0-9]*.png"))) > 10)
    slurm.run("scancel", submitted["sample"][0])
    states = {name: [slurm.wait_job(j, "COMPLETED", "FAILED", "CANCELLED") for j in submitted[name]] for name in jobs}
    assert states == {"encode": ["COMPLETED", "FAILED"], "sample": ["CANCELLED", "COMPLETED"], "stages": ["COMPLETED"]}
    assert not (latents / "manifest.json").exists()
    assert not (images / "grid.png").exists()
    assert "# boundaries found by" in (tmp_path / "mine.yaml").read_text()
    made = {path: path.stat().st_mtime_ns for path in [*latents.glob("0*.tar"), *images.glob("[0-9]*.png")]}

    for name in ("encode", "sample"):
        (again,) = submit(name)
        assert slurm.wait_job(again, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
        assert json.loads(msdiff("jobs", tmp_path / name, "--json")[1])["step"] == 2
    assert made.items() <= {path: path.stat().st_mtime_ns for path in made}.items()
    for command, out in ((encode, latents), (sample, images)):
        alone = tmp_path / "alone" / out.name
        assert msdiff(*command, "--out", alone)[0] == 0
        assert files(out) == files(alone)


@pytest.mark.slow
def test_an_evaluation_whose_part_was_cancelled_is_resumed_and_scored_once(
    slurm: SlurmCluster, cluster_file: ClusterFile, msdiff: Msdiff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digits, run = tmp_path / "digits", tmp_path / "run"
    prepare("digits", digits, None, "train", 6)
    small = ["model.encoder_channels=16", "model.decoder_channels=[16,16,16]", f"data.shards={digits}"]
    small += ["train.precision=fp32", "train.steps=2", "train.global_batch_size=12", "preview.every=0"]
    assert msdiff("train", QUICKSTART, *small, "--run-dir", run)[0] == 0
    images = tmp_path / "images"
    evaluate = ["evaluate", run, "--num", 120, "--batch-size", 2, "--steps", 4, "--metrics", "kid"]
    parts = ["--part", "{part}", "--parts", "{parts}", "--samples", images]

    def submit() -> list[str]:
        array = ["array", "--parts", 2, "--cluster", cluster_file(), "--folder", tmp_path / "jobs", "--"]
        status, printed = msdiff(*array, *evaluate, *parts)
        assert status == 0, printed
        return json.loads((tmp_path / "jobs/launch/job.json").read_text())["job_ids"]

    first, second = submit()
    wait_for(lambda: len(list(images.glob("[0-9]*.png"))) > 10)
    slurm.run("scancel", first)
    ended = [slurm.wait_job(job, "COMPLETED", "FAILED", "CANCELLED") for job in (first, second)]
    assert ended == ["CANCELLED", "COMPLETED"]
    assert not (run / "evaluations.jsonl").exists()
    (again,) = submit()
    assert slurm.wait_job(again, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
    (record,) = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert msdiff(*evaluate, "--samples", tmp_path / "alone", "--nproc", 2)[0] == 0
    alone = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert record["metrics"] == alone["metrics"]
