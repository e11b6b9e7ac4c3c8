"""`train.freeze`: what is frozen stays as it is bit by bit, and the rest trains as in one plain process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.recipe import recipe_from
from msdiff_dist.testing import run_distributed
from tests.distributed.reference import train_reference
from tests.distributed.tiny_run import ADAM, open_run, recipe_of

pytestmark = pytest.mark.distributed

STEPS, TOLERANCE, LENGTH = 3, 1e-5, 0.1
CLIPPED = ADAM | {"grad_clip": 0.1, "weight_decay": 0.01}
RECOMPUTED = {"activation_checkpointing__encoder": True, "activation_checkpointing__decoders": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run with frozen parameters; `is_frozen` says by other means than patterns which these are."""

    world: int
    freeze: list[str]
    is_frozen: Callable[[str], bool]
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> dict[str, Any]:
        power = {"snapshot_every": STEPS, "lengths": [LENGTH]}
        return recipe_of(CLIPPED, train__freeze=self.freeze, ema__power=power, **self.changes)


def within(*parts: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(parts)


def is_norm_or_in_block_3(name: str) -> bool:
    return name.split(".")[-3:-1] in (["in_layers", "0"], ["out_layers", "0"]) or ".output_blocks.3." in name


NORMS_AND_BLOCK_3 = ["*.in_layers.0.*", "*.out_layers.0", "stages.*.output_blocks.3"]
LINE = {"parallel__placement": [[0], [0, 1], [1, 2]], "train__gradient_accumulation_steps": 2}
CASES = {
    "shared, alone": Case(world=1, freeze=["shared"], is_frozen=within("shared.")),
    "stages 1 and 2, alone": Case(
        world=1, freeze=["shared", "stages.1", "stages.2"], is_frozen=within("shared.", "stages.1.", "stages.2.")
    ),
    "shared": Case(
        world=2, freeze=["shared"], is_frozen=within("shared."),
        changes={"parallel__zero_decoders": 2, "train__gradient_accumulation_steps": 2},
    ),
    "recomputed blocks": Case(
        world=2, freeze=NORMS_AND_BLOCK_3, is_frozen=is_norm_or_in_block_3, changes=RECOMPUTED
    ),
    "first blocks, ZeRO 3, recomputed": Case(
        world=2, freeze=["shared.input_blocks.?.*", "stages.2"], is_frozen=within("shared.input_blocks.", "stages.2."),
        changes=RECOMPUTED | {"parallel__zero_shared": 3},
    ),
    "own encoders": Case(
        world=2, freeze=["stages.0.encoder", "stages.2"], is_frozen=within("stages.0.encoder.", "stages.2."),
        changes={"model__share_encoder": False},
    ),
    "a stage": Case(
        world=3, freeze=["stages.1"], is_frozen=within("stages.1."),
        changes=LINE | {"parallel__zero_shared": 2, "parallel__zero_decoders": 2},
    ),
    "shared and a stage": Case(
        world=3, freeze=["shared", "stages.1"], is_frozen=within("shared.", "stages.1."),
        changes={
            "parallel__placement": [[0], [0, 2], [2]], "train__gradient_accumulation_steps": 2,
            "stages__sampling": [3, 2, 1],
        },
    ),
    "within parts": Case(
        world=3, freeze=NORMS_AND_BLOCK_3, is_frozen=is_norm_or_in_block_3,
        changes=LINE | {"parallel__zero_shared": 2, "parallel__zero_decoders": 2},
    ),
    "within parts, ZeRO 3": Case(
        world=3, freeze=NORMS_AND_BLOCK_3, is_frozen=is_norm_or_in_block_3, changes=LINE | {"parallel__zero_shared": 3}
    ),
}  # fmt: skip


def train_each(rank: int, world_size: int, path: Path) -> list[tuple[list[float], list[float]]]:
    """Train every case of this many ranks; losses and gradient norms of each."""
    results = []
    for name, case in CASES.items():
        if case.world != world_size:
            continue
        losses, norms = [], []
        with open_run(rank, world_size, case.recipe, path / name) as run:
            while run.state.step < STEPS:
                outcome = run.step(CLIPPED["lr"])
                losses.append(outcome.loss)
                norms.append(outcome.grad_norm)
                run.save_if_due(now=run.state.step == STEPS)
        results.append((losses, norms))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_rest_trains_as_in_one_process(world_size: int, tmp_path: Path) -> None:
    results = run_distributed(train_each, world_size, world_size, tmp_path)
    cases = {name: case for name, case in CASES.items() if case.world == world_size}
    for (name, case), (losses, norms) in zip(cases.items(), results[0], strict=True):
        reference = train_reference(recipe_from(case.recipe), STEPS, is_frozen=case.is_frozen)
        assert losses == pytest.approx(reference.losses, rel=TOLERANCE), name
        assert norms == pytest.approx(reference.grad_norms, rel=TOLERANCE), name
        assert max(norms) > 0.1, "clipping is exercised"
        checkpoint = CheckpointReader(tmp_path / name / f"checkpoints/step_{STEPS:08d}")
        snapshot = CheckpointReader(tmp_path / name / f"ema_snapshots/step_{STEPS:08d}")
        assert sorted(checkpoint.names()) == sorted(reference.state), "a checkpoint is complete"
        power = f"ema_{LENGTH}"
        for parameter, expected in reference.state.items():
            moments = {checkpoint.holds(kind, parameter) for kind in ("exp_avg", "exp_avg_sq")}
            assert moments == {not case.is_frozen(parameter)}, f"{name}: of what trains alone"
            found = [checkpoint.tensor(kind, parameter) for kind in ("param", "ema", power)]
            found.append(snapshot.tensor(power, parameter))
            if case.is_frozen(parameter):
                assert all(torch.equal(tensor, reference.first[parameter]) for tensor in found), f"{name}: {parameter}"
                continue
            averages = [reference.ema[parameter], reference.power[LENGTH][parameter]]
            for tensor, wanted in zip(found, [expected, *averages, averages[1]], strict=True):
                torch.testing.assert_close(tensor, wanted, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
