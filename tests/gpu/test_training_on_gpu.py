"""Training and sampling on a GPU in bf16, through every attention backend there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from msdiff_dist.apps.train.local import run_local
from msdiff_dist.distributed.gpus import peak_petaflops
from msdiff_dist.recipe import load_recipe, recipe_mapping

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEBUG = Path(__file__).parents[2] / "recipes/debug.yaml"


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _losses(run: Path, *overrides: str) -> list[float]:
    recipe = load_recipe(
        DEBUG, ["train.steps=6", "preview.every=6", "preview.num=4", "preview.sampler.steps=4", *overrides]
    )
    assert run_local(recipe_mapping(recipe), run, 1) == "finished"
    assert (run / "samples/step_00000006.png").exists()
    return [line["loss"] for line in _lines(run)]


def test_bf16_stays_near_fp32(tmp_path: Path) -> None:
    exact = _losses(tmp_path / "fp32", "train.precision=fp32")
    for backend in ("sdpa", "math", "xformers"):
        near = _losses(tmp_path / backend, "train.precision=bf16", f"model.attention_backend={backend}")
        assert near == pytest.approx(exact, rel=2e-2)


def test_memory_and_utilisation_are_measured(tmp_path: Path) -> None:
    _losses(tmp_path / "run", "train.precision=bf16")
    lines, whole = _lines(tmp_path / "run"), torch.cuda.get_device_properties(0).total_memory
    memory = [line["memory_bytes"] for line in lines]
    assert 0 < memory[0] <= memory[-1] < whole
    assert memory == sorted(memory), "a peak never falls"
    known = peak_petaflops(torch.cuda.get_device_name(0), "bf16", tf32=False) is not None
    assert all(0 < line["mfu"] < 1 if known else line["mfu"] is None for line in lines)
