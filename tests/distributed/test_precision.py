"""`train.precision: auto` is decided by the first start of a run and kept by the later ones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from msdiff_dist.apps.train.local import PRELOAD
from msdiff_dist.apps.train.rank import run_rank
from msdiff_dist.distributed.precision import native_bf16
from msdiff_dist.distributed.spawn import run_ranks
from msdiff_dist.recipe import recipe_from
from tests.distributed.tiny_run import ADAM, recipe_of

pytestmark = pytest.mark.distributed


def precision_of(run: Path) -> str:
    return str(OmegaConf.load(run / "recipe.yaml").train.precision)


def shown(rank: int, mapping: dict[str, Any], run: Path) -> str:
    """What a run shows on its terminal. A rank's standard error is that of the fork server, which tests share."""
    terminal = io.StringIO()
    assert run_rank(recipe_from(mapping), run, terminal) == "finished"
    return terminal.getvalue()


def test_auto_is_written_into_the_run_and_kept(tmp_path: Path) -> None:
    def start(steps: int, precision: str) -> str:
        changes = {"train__precision": precision, "train__steps": steps}
        mapping = recipe_of(ADAM, **changes) | {"checkpoint": {"every": 0}}
        (text,) = run_ranks(shown, 1, mapping, tmp_path / f"{precision}-first", preload=PRELOAD)
        return str(text)

    fits = "bf16" if native_bf16(torch.device("cpu"))[0] else "fp32"
    assert f"in {fits} (this CPU computes bf16" in start(1, "auto")
    assert precision_of(tmp_path / "auto-first") == fits
    start(1, "fp32")
    (tmp_path / "auto-first").rename(tmp_path / "aside")
    (tmp_path / "fp32-first").rename(tmp_path / "auto-first")
    assert "in fp32 (as the run began)" in start(2, "auto")
    assert precision_of(tmp_path / "auto-first") == "fp32"
