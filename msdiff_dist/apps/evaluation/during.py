"""An evaluation during training: what the ranks sample, and the process beside them that computes its scores.

`python -m msdiff_dist.apps.evaluation.during FOLDER` is that process. RUN/evaluations/.training/step_XXXXXXXX is such a
folder: it holds the averages of a step in the layout of a checkpoint, and the images that the ranks sampled from them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from msdiff_dist.apps.evaluation.evaluate import EvaluationRequest, check_request, evaluate
from msdiff_dist.checkpoint.layout import CheckpointIndex
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.worker_processes import end_with_parent
from msdiff_dist.errors import MsdiffError, UserError
from msdiff_dist.evaluation.during_training import EvaluationConfig
from msdiff_dist.evaluation.sampling_job import SamplingJob
from msdiff_dist.recipe import stored_recipe

IMAGES = "images"
"""Folder in FOLDER for the images."""


def request_of(config: EvaluationConfig, folder: Path) -> EvaluationRequest:
    """The evaluation that a recipe asks for, of the averages and images in `folder`."""
    return EvaluationRequest(
        subject=folder,
        job=SamplingJob(
            num=config.num,
            seed=config.seed,
            sampler=config.sampler,
            prompts=config.prompts,
            batch_size=config.batch_size,
        ),
        metrics=config.metrics,
        features=config.features,
        feature_weights=None if config.feature_weights is None else Path(config.feature_weights),
        clip_model=config.clip_model,
        reference=config.reference,
        samples=folder / IMAGES,
        during_training=True,
    )


def check_evaluation(config: EvaluationConfig, trained_on: DataConfig | None) -> None:
    """Refuse an evaluation for which something is missing on this machine.

    Raises:
        UserError: weights or reference are missing or do not fit; it names the recipe's field.
    """
    try:
        check_request(request_of(config, Path()), trained_on)
    except UserError as e:
        if not e.field.startswith("--"):
            raise
        field = f"evaluation.{e.field[2:].replace('-', '_')}"
        raise type(e)(field, e.value, e.problem, e.remedy) from None


def start_scoring(folder: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """The process that scores the images in `folder`, on the CPU: the GPU's time and memory are for training."""
    environment: Mapping[str, str] = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "msdiff_dist.apps.evaluation.during", str(folder)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _score(folder: Path) -> None:
    recipe: dict[str, Any] = dict(CheckpointIndex.load(folder).recipe)
    evaluate(request_of(stored_recipe(recipe).evaluation, folder))


if __name__ == "__main__":
    end_with_parent()
    os.nice(19)
    try:
        _score(Path(sys.argv[1]))
    except MsdiffError as e:
        sys.exit(f"error {e}")
