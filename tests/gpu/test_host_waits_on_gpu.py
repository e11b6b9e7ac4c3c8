"""On a real GPU too the host waits for the device once in a training step."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from msdiff_dist.apps.train.trainer import Trainer
from msdiff_dist.distributed.environment import process_group
from msdiff_dist.distributed.heartbeat import WaitLimits
from msdiff_dist.distributed.spawn import run_ranks
from msdiff_dist.recipe import recipe_from, recipe_mapping
from msdiff_dist.training.run_folder import RunFolder
from tests.golden.cases import recipe_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def waits(rank: int, mapping: dict[str, Any], path: Path) -> list[str]:
    """What torch says of operations that wait, in the fifth step."""
    with (
        process_group(WaitLimits(step_s=300, start_s=300)) as env,
        Trainer(recipe_from(mapping), RunFolder(path), env) as run,
    ):
        for _ in range(4):
            run.step(1e-3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            run.step(1e-3)
            torch.cuda.set_sync_debug_mode("default")
        return [f"{w.filename}:{w.lineno}: {w.message}" for w in caught if "synchroniz" in str(w.message)]


@pytest.mark.parametrize("case", ["discrete_images", "edm_images", "vp_latents", "mixed_text_latents"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_waits_once(case: str, precision: str, tmp_path: Path) -> None:
    recipe = recipe_of(case, tmp_path)
    mapping = recipe_mapping(replace(recipe, train=replace(recipe.train, precision=precision)))
    (found,) = run_ranks(waits, 1, mapping, tmp_path / "run", timeout=300)
    assert len(found) == 1, "\n".join(found)
    assert "agree.py" in found[0]
