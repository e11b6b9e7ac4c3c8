"""Results of eight steps of training: losses, gradient norms, learning rates, and norms of the last weights.

All are floating-point results, which differ between CPUs and numbers of ranks in their last digits.
"""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from msdiff_dist.apps.train.local import run_local
from msdiff_dist.apps.train.rank import run_rank
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.checkpoint.power_profile import SNAPSHOTS
from msdiff_dist.export.posthoc import open_posthoc
from msdiff_dist.recipe import recipe_mapping
from tests.golden.cases import STEPS, recipe_of

FIELDS = ("grad_norm", "loss", "loss_per_stage", "lr")
POSTHOC_LENGTH = 0.07  # between the two lengths that are tracked


def training_record(case: str, folder: Path, world_size: int) -> dict[str, Any]:
    """Train a case on ranks of this machine; the record of the run."""
    recipe, run = recipe_of(case, folder), folder / f"{case}-run"
    assert run_local(recipe_mapping(recipe), run, world_size) == "finished"
    return run_record(run)


def single_process_record(case: str, folder: Path) -> dict[str, Any]:
    """The record of a run on one rank, which is this process. DeepSpeed allows it once in a process."""
    recipe, run = recipe_of(case, folder), folder / f"{case}-run"
    assert run_rank(recipe, run, io.StringIO()) == "finished"
    return run_record(run)


def run_record(run: Path) -> dict[str, Any]:
    """The record of a finished run: `FIELDS` of every step, and norms of the last checkpoint by kind and part.

    Weights and optimizer moments have their own norm, averages that of their difference from the weights.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    record: dict[str, Any] = {name: [line[name] for line in lines] for name in FIELDS}
    reader = CheckpointReader(run / f"checkpoints/step_{STEPS:08d}")
    norms = {kind: _norms(partial(reader.tensor, kind), reader, kind.startswith("ema")) for kind in reader.kinds}
    if (run / SNAPSHOTS).exists():
        norms[f"post-hoc {POSTHOC_LENGTH}"] = _norms(open_posthoc(run, POSTHOC_LENGTH).tensor, reader, True)
    return record | {"norms": norms}


def _norms(tensor: Callable[[str], Tensor], reader: CheckpointReader, from_weights: bool) -> dict[str, float]:
    """L2 norm of each part of the model: the shared encoder, and the decoder of each stage."""
    squares: dict[str, float] = defaultdict(float)
    for name in reader.names():
        part = name.split(".")[0] if name.startswith("shared.") else ".".join(name.split(".")[:2])
        values = tensor(name) - reader.tensor("param", name) if from_weights else tensor(name)
        squares[part] += float(values.double().square().sum())
    return {part: math.sqrt(total) for part, total in sorted(squares.items())}
