"""Evaluations during training and of its checkpoints: the same scores on any ranks and in any slices, once a step."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msdiff_dist.apps.evaluation.evaluate import EvaluationRequest, evaluate
from msdiff_dist.apps.evaluation.follow import _hold, follow
from msdiff_dist.apps.evaluation.subject import FOLLOWED
from msdiff_dist.apps.train.loop import train
from msdiff_dist.checkpoint.layout import remove, step_folder
from msdiff_dist.data.make.pack import pack
from msdiff_dist.diffusion.solvers import SamplerConfig
from msdiff_dist.distributed.heartbeat import WaitLimits
from msdiff_dist.errors import DataError
from msdiff_dist.evaluation.feature_classifier import ClassifierInfo, FeatureClassifier, save_classifier
from msdiff_dist.evaluation.sampling_job import SamplingJob
from msdiff_dist.recipe import recipe_from, recipe_mapping
from msdiff_dist.testing import run_distributed
from msdiff_dist.training.metric_sink import SinkContext
from msdiff_dist.training.run_folder import RunFolder
from msdiff_dist.training.sinks import SINKS, JsonLines, Sinks, Terminal
from tests.distributed.tiny_run import ADAM, open_run, recipe_of

pytestmark = pytest.mark.distributed
STEPS, NUM, BATCH = 6, 14, 4
SAMPLER = {"steps": 3}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def recipe_on(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe on images of noise, whose weights do not change, so that they are the same on any ranks."""
    if not (folder / "images").exists():
        for name in "abc":
            (folder / "images" / name).mkdir(parents=True)
        rng = np.random.default_rng(0)
        for i in range(36):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(
                folder / "images" / "abc"[i % 3] / f"{i:02d}.png"
            )
        pack(folder / "images", folder / "shards")
        torch.manual_seed(0)
        save_classifier(FeatureClassifier(ClassifierInfo(image_shape=(3, 8, 8), classes=3)), folder / "net.safetensors")
    evaluation = {
        "every": 2, "num": NUM, "batch_size": BATCH, "sampler": SAMPLER, "metrics": ["fid"],
        "features": str(folder / "net.safetensors"),
    }  # fmt: skip
    data = {"shards": str(folder / "shards"), "image_size": 8, "lanes": 12}
    changes = {f"evaluation__{k}": v for k, v in evaluation.items()} | changes
    changes |= {"train__steps": STEPS, "checkpoint__every": 2, "model__in_channels": 3, "model__out_channels": 3}
    return recipe_of(ADAM | {"lr": 1e-30}, **changes) | {"data": data | {"num_classes": 3}}


def run_to(rank: int, world_size: int, recipe: dict[str, Any], path: Path, stop_after: int) -> str:
    """Train, and ask to stop after a step; what the user reads."""
    torch.set_num_threads(1)
    terminal = io.StringIO()
    with open_run(rank, world_size, recipe, path) as run:
        context = SinkContext(
            folder=RunFolder(path), first_step=run.state.step, total_steps=STEPS, terminal=terminal, recipe=recipe
        )
        sinks = [JsonLines(context), SINKS["tensorboard"](context), Terminal(context)] if rank == 0 else []
        with Sinks(sinks) as all_sinks:
            train(run, all_sinks, WaitLimits(step_s=600, start_s=600), lambda: run.state.step >= stop_after)
    return terminal.getvalue()


def new_run(path: Path, recipe: dict[str, Any]) -> Path:
    folder = RunFolder(path)
    folder.open(recipe_mapping(recipe_from(recipe)))
    folder.close()
    return path


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def request(run: Path, folder: Path) -> EvaluationRequest:
    job = SamplingJob(num=NUM, sampler=SamplerConfig(**SAMPLER), batch_size=BATCH)
    return EvaluationRequest(subject=run, job=job, metrics=("fid",), features=str(folder / "net.safetensors"))


def scalars(run: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return {event.step: event.value for event in board.Scalars("evaluation/net/fid")}


def test_the_same_scores_on_any_ranks_and_of_a_checkpoint(tmp_path: Path) -> None:
    found = []
    # A pause of next to no time has one call of the network.
    for world_size, pause in ((2, 1e-9), (4, 60.0)):
        recipe = recipe_on(tmp_path, evaluation__every=STEPS, evaluation__pause_seconds=pause)
        run = new_run(tmp_path / str(world_size), recipe)
        said = run_distributed(run_to, world_size, world_size, recipe, run, 99)[0]
        (record,) = records(run)
        assert (record["step"], record["num"], record["subject"]) == (STEPS, NUM, str(run))
        assert f"evaluation of step {STEPS}: net/fid" in said
        assert scalars(run)[STEPS] == pytest.approx(record["metrics"]["fid"])
        assert not list((run / "evaluations/.training").iterdir())
        found.append(record["metrics"])
    assert found[0] == found[1]
    torch.set_num_threads(1)
    alone = evaluate(request(run, tmp_path))  # sampled by the command, not by ranks
    assert alone is not None
    assert alone.record["metrics"] == found[0]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_evaluates_no_step_twice(tmp_path: Path) -> None:
    recipe = recipe_on(tmp_path, evaluation__pause_seconds=1e-9)
    run = new_run(tmp_path / "run", recipe)
    said = run_distributed(run_to, 1, 1, recipe, run, 3)[0]
    kept = run / "evaluations/.training/step_00000002"
    assert (kept / "checkpoint.json").is_file()
    assert "evaluation of step 4 skipped" not in said  # training had stopped before
    # Half of the images, as if more slices had been taken: an image of a batch that is there is not made again.
    run_distributed(sampled_in_part, 1, 1, recipe, run)
    made = sorted(path.name for path in (kept / "images").iterdir())
    assert 0 < len(made) < NUM
    said = run_distributed(run_to, 1, 1, recipe, run, 99)[0]
    assert "evaluation of step 4 skipped: that of step 2 is under way" in said
    assert [record["step"] for record in records(run)] == [2, 6]
    assert records(run)[0]["metrics"] == records(run)[1]["metrics"]  # of the same weights, made in other slices
    # Steps 5 and 6 again: what was evaluated of the same training stays.
    remove(step_folder(run / "checkpoints", 6))
    run_distributed(run_to, 1, 1, recipe | {"evaluation": recipe["evaluation"] | {"pause_seconds": 60.0}}, run, 99)
    assert [record["step"] for record in records(run)] == [2, 6, 4]


def sampled_in_part(rank: int, world_size: int, recipe: dict[str, Any], path: Path) -> None:
    with open_run(rank, world_size, recipe, path) as run:
        assert run.evaluations.active == 2
        while not (images := path / "evaluations/.training/step_00000002/images").exists() or not list(
            images.iterdir()
        ):
            run.evaluations.go_on(1e-9, Sinks())


def test_a_failed_evaluation_does_not_stop_training_and_a_follower_evaluates_each_checkpoint_once(
    tmp_path: Path,
) -> None:
    recipe = recipe_on(tmp_path, evaluation__every=STEPS)
    run = new_run(tmp_path / "run", recipe)
    (run / "evaluations").write_text("in the way")
    said = run_distributed(run_to, 1, 1, recipe, run, 99)[0]
    assert "warning: evaluation of step 6 ended" in said
    assert f"trained {STEPS} steps" in said
    (run / "evaluations").unlink()
    # A follower was killed while it evaluated the first checkpoint, which training has removed since.
    first = step_folder(run / "checkpoints", 2)
    assert _hold(first, run / FOLLOWED / first.name)
    remove(first)
    assert _hold(first, run / FOLLOWED / "step_00000099") is None
    told: list[str] = []
    for _ in range(2):
        follow(request(run, tmp_path), lambda _: told.append("found"), told.append)
    assert [(record["step"], record["subject"]) for record in records(run)] == [(k, str(run)) for k in (2, 4, 6)]
    assert told.count("found") == 3
    assert [path.name for path in (run / FOLLOWED).iterdir()] == ["lock"]
    with pytest.raises(DataError, match="is no run"):
        follow(request(tmp_path, tmp_path), lambda _: None, told.append)
