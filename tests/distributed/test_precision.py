"""`train.precision: auto` is decided by the first start of a run, for all its ranks, and kept by the later ones."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from msdiff_dist.apps.train.local import PRELOAD
from msdiff_dist.apps.train.rank import run_rank
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.distributed.precision import PrecisionChoice, agree_on_precision, bf16_support
from msdiff_dist.distributed.spawn import run_ranks
from msdiff_dist.export.weights import CheckpointWeights
from msdiff_dist.recipe import recipe_from
from msdiff_dist.testing import run_distributed
from tests.distributed.tiny_run import ADAM, open_run, recipe_of

pytestmark = pytest.mark.distributed

WITHOUT_BF16 = "AVX512_CORE"  # limits oneDNN to instructions that CPUs without bf16 have
NATIVE = bf16_support(torch.device("cpu")).native


def precision_of(run: Path) -> str:
    return str(OmegaConf.load(run / "recipe.yaml").train.precision)


def mapping(precision: str, steps: int) -> dict[str, Any]:
    changes = {"train__precision": precision, "train__steps": steps}
    return recipe_of(ADAM, **changes) | {"checkpoint": {"every": 0}}


def shown(rank: int, mapping: dict[str, Any], run: Path) -> str:
    """What a run shows on its terminal. A rank's standard error is that of the fork server, which tests share."""
    terminal = io.StringIO()
    assert run_rank(recipe_from(mapping), run, terminal) == "finished"
    return terminal.getvalue()


def start(run: Path, precision: str, steps: int, env: dict[str, str] | None = None) -> str:
    return str(run_ranks(shown, 1, mapping(precision, steps), run, preload=PRELOAD, env=env)[0])


def test_auto_is_written_into_the_run_and_kept(tmp_path: Path) -> None:
    fits = "bf16" if NATIVE else "fp32"
    assert f"in {fits} (this CPU computes bf16" in start(tmp_path / "auto", "auto", 1)
    assert precision_of(tmp_path / "auto") == fits
    checkpoint = CheckpointReader(tmp_path / "auto/checkpoints/step_00000001")
    assert CheckpointWeights(checkpoint).description.precision == fits, "samples and exports have it from here"
    start(tmp_path / "fp32", "fp32", 1)
    assert "in fp32 (as the run began)" in start(tmp_path / "fp32", "auto", 2)
    assert precision_of(tmp_path / "fp32") == "fp32"


def test_a_machine_that_emulates_bf16_resumes_a_run_in_it_and_says_what_it_costs(tmp_path: Path) -> None:
    start(tmp_path / "run", "bf16", 1)
    resumed = start(tmp_path / "run", "auto", 2, {"ONEDNN_MAX_CPU_ISA": WITHOUT_BF16})
    assert "in bf16 (as the run began)" in resumed
    assert "from step 1" in resumed
    assert "warning: this CPU computes bf16 by emulation: a convolution takes" in resumed
    assert precision_of(tmp_path / "run") == "bf16"


def agreed(rank: int) -> list[PrecisionChoice]:
    if rank == 1:
        os.environ["ONEDNN_MAX_CPU_ISA"] = WITHOUT_BF16
    cpu = torch.device("cpu")
    return [agree_on_precision("auto", cpu, None), agree_on_precision("bf16", cpu, None)]


def test_one_rank_that_emulates_bf16_decides_for_all() -> None:
    reason = "bf16 is computed by emulation on rank 1" if NATIVE else "this CPU computes bf16 by emulation"
    first, second = run_distributed(agreed, 2)
    assert first == second
    chosen, asked = first
    assert (chosen.precision, chosen.why, chosen.warning) == ("fp32", reason, None)
    assert (asked.precision, asked.why) == ("bf16", "as the recipe asks")
    assert asked.warning is not None
    assert asked.warning.startswith(f"{reason}: a convolution takes")


def losses_and_norms(rank: int, world_size: int, path: Path) -> list[tuple[float, float]]:
    with open_run(rank, world_size, mapping("bf16", 10), path) as run:
        outcomes = [run.step(ADAM["lr"]) for _ in range(10)]
    return [(outcome.loss, outcome.grad_norm) for outcome in outcomes]


def test_ranks_in_bf16_agree_with_one(tmp_path: Path) -> None:
    """Each rank rounds its own gradients to bf16, 2^-9 of an element; their sums are fp32."""
    one, four = (run_distributed(losses_and_norms, n, n, tmp_path / str(n))[0] for n in (1, 4))
    assert [loss for loss, _ in four] == pytest.approx([loss for loss, _ in one], rel=1e-4)
    assert [norm for _, norm in four] == pytest.approx([norm for _, norm in one], rel=2e-3)
