"""`guide`: the encoder is aligned with a teacher as in one plain process, up to `stop_at`, and not after it."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from msdiff_dist.apps.train.costs import cost_report, petaflops_after, step_petaflops, steps_within
from msdiff_dist.apps.train.plan import plan_phases
from msdiff_dist.apps.train.rehearsal import rehearse
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.config import to_mapping
from msdiff_dist.evaluation.feature_classifier import ClassifierInfo, FeatureClassifier, save_classifier
from msdiff_dist.export.export import export
from msdiff_dist.export.timed_model import load_model
from msdiff_dist.models.projector import build_projector
from msdiff_dist.recipe import recipe_from
from msdiff_dist.testing import run_distributed
from tests.distributed.reference import train_reference
from tests.distributed.tiny_run import ADAM, open_run, recipe_of
from tests.golden.cases import write_images

pytestmark = pytest.mark.distributed

STEPS, STOP, TOLERANCE = 4, 2, 1e-5
LAYOUTS: dict[int, dict[str, Any]] = {
    1: {"parallel__zero_shared": 1},
    3: {
        "parallel__zero_shared": 2, "parallel__placement": [[0], [0, 1], [1, 2]],
        "train__gradient_accumulation_steps": 2,
    },
    4: {"parallel__zero_shared": 3},
}  # fmt: skip


def guided(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe on images of 8x8 pixels, whose teacher's features are of 2x2 places, and the middle's of 4x4."""
    guide = {"features": str(folder / "teacher.safetensors"), "weight": 0.7, "gram_weight": 0.3, "width": 6}
    recipe = recipe_of(
        ADAM, model__in_channels=1, model__out_channels=1, stages__sampling="uniform", train__steps=STEPS,
        **{f"guide__{name}": value for name, value in (guide | {"stop_at": STOP}).items()}, **changes,
    )  # fmt: skip
    data = {"shards": str(folder / "images"), "image_size": 8, "channels": 1, "num_classes": 3, "lanes": 12}
    return recipe | {"data": data}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", 1)
    torch.manual_seed(3)
    info = ClassifierInfo(image_shape=(1, 8, 8), classes=3, channels=(5, 7), features=4)
    save_classifier(FeatureClassifier(info), tmp_path / "teacher.safetensors")
    return tmp_path


def train_and_resume(rank: int, mapping: dict[str, Any], folder: Path) -> list[Any]:
    """Train, saving after every step; again from the first step's checkpoint, and from the one after the last guided
    step. The outcomes of the first training."""
    world = dist.get_world_size()
    runs = []
    for start in (0, 1, STOP + 1):
        if start and rank == 0:
            kept = f"checkpoints/step_{start:08d}"
            shutil.copytree(folder / "run_0" / kept, folder / f"run_{start}" / kept)
        dist.barrier()
        outcomes = []
        with open_run(rank, world, mapping, folder / f"run_{start}") as run:
            assert run.state.step == start
            while run.state.step < STEPS:
                outcomes.append(run.step(ADAM["lr"]))
                run.save_if_due(now=True)
        runs.append(outcomes)
        whole = runs[0][start:]
        assert [(o.loss, o.grad_norm, o.guide_loss) for o in outcomes] == [
            (o.loss, o.grad_norm, o.guide_loss) for o in whole
        ]
    return runs[0]


@pytest.mark.parametrize("world_size", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_guided_training_is_that_of_one_process_and_resumes(world_size: int, folder: Path) -> None:
    mapping = guided(folder, **LAYOUTS[world_size])
    outcomes = run_distributed(train_and_resume, world_size, mapping, folder)[0]
    reference = train_reference(recipe_from(mapping), STEPS)
    assert [o.loss for o in outcomes] == pytest.approx(reference.losses, rel=TOLERANCE)
    assert [o.grad_norm for o in outcomes] == pytest.approx(reference.grad_norms, rel=TOLERANCE)
    assert [o.guide_loss for o in outcomes[:STOP]] == pytest.approx(reference.guide_losses, rel=TOLERANCE)
    assert [o.guide_loss for o in outcomes[STOP:]] == [None] * (STEPS - STOP)
    ends = [CheckpointReader(folder / f"run_{start}/checkpoints/step_{STEPS:08d}") for start in (0, 1, STOP + 1)]
    assert sorted(ends[0].names()) == sorted(reference.state)
    for name, wanted in reference.state.items():
        found = [end.tensor("param", name) for end in ends]
        torch.testing.assert_close(found[0], wanted, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(found[0], found[1]), f"{name}: resumed among the guided steps"
        assert torch.equal(found[0], found[2]), f"{name}: resumed after them"
        moved = not torch.equal(wanted, reference.first[name])
        assert moved, f"{name} trains"
    for kind in ("param", "exp_avg"):
        stopped = CheckpointReader(folder / f"run_0/checkpoints/step_{STOP:08d}").tensor(kind, "guide.0.weight")
        assert torch.equal(ends[0].tensor(kind, "guide.0.weight"), stopped), "nothing moves the projector any more"

    if world_size == 1:  # the projector stays in training
        export(folder / "run_0", folder / "export")
        for weights in (folder / "export", folder / "run_0"):
            assert not any(name.startswith("guide") for name, _ in load_model(weights).named_parameters())
        mapping["train"] |= {"init_from": str(folder / "export")}
        ((norm, moved),) = run_distributed(warm_started, 1, mapping, folder)
        assert norm > 0
        assert moved == 0, "its first weights are its own"


def train_one_stage(rank: int, world_size: int, mapping: dict[str, Any], folder: Path) -> list[Any]:
    with open_run(rank, world_size, mapping, folder / f"run_{world_size}") as run:
        outcomes = [run.step(ADAM["lr"]) for _ in range(STEPS)]
        run.save()
    return outcomes


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_of_one_stage_are_guided_as_in_one_process(world_size: int, folder: Path) -> None:
    """On two ranks one holds stage 0 alone: in other batches it has no samples and stands by, in the guide's steps and
    after them."""
    placed = {} if world_size == 1 else {"parallel__placement": [[0], [1, 2]], "parallel__zero_shared": 2}
    mapping = guided(folder, stages__batch="one_stage", train__seed=1, **placed)
    outcomes = run_distributed(train_one_stage, world_size, world_size, mapping, folder)[0]
    drawn = [[k for k, n in enumerate(o.samples_per_stage) if n] for o in outcomes]
    assert all(len(stages) == 1 for stages in drawn)
    assert {stages == [0] for stages in drawn[:STOP]} == {True, False}, "each rank stands by in a guided step"
    reference = train_reference(recipe_from(mapping), STEPS)
    assert [o.loss for o in outcomes] == pytest.approx(reference.losses, rel=TOLERANCE)
    assert [o.grad_norm for o in outcomes] == pytest.approx(reference.grad_norms, rel=TOLERANCE)
    assert [o.guide_loss for o in outcomes[:STOP]] == pytest.approx(reference.guide_losses, rel=TOLERANCE)
    end = CheckpointReader(folder / f"run_{world_size}/checkpoints/step_{STEPS:08d}")
    for name, wanted in reference.state.items():
        torch.testing.assert_close(
            end.tensor("param", name), wanted, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


def warm_started(rank: int, mapping: dict[str, Any], folder: Path) -> tuple[float, float]:
    """The gradient norm of a guided run's first step from an export; how far its projector is from its own start."""
    with open_run(rank, 1, mapping, folder / "warm") as run:
        own = next(p.detach().clone() for p in run.engines.projector.module.parameters())  # type: ignore[union-attr]
        wanted = next(build_projector(own.shape[1], own.shape[0], 7, run.recipe.train.seed).parameters())
        return run.step(1e-4).grad_norm, float((own - wanted).abs().max())


def test_every_rank_issues_the_projectors_collectives_in_one_order(folder: Path) -> None:
    recipe = recipe_from(guided(folder, **LAYOUTS[3]))
    guided_ranks, plain = (rehearse(r, 3, None, on_gpus=False) for r in (recipe, replace(recipe, guide=None)))
    assert guided_ranks["orders_agree"]
    assert guided_ranks != plain, "the projector has collectives of its own"


def test_the_guide_is_counted_up_to_its_last_step(folder: Path) -> None:
    recipe = recipe_from(guided(folder))
    planned = plan_phases(recipe, 1)
    plan = planned[0][1]
    assert plan.guide is not None
    assert recipe.guide is not None
    # The teacher's convolutions: 3x3 of 1 -> 5 channels at 4x4 places, and of 5 -> 7 at 2x2.
    assert plan.guide.teacher_macs == 9 * 5 * 16 + 9 * 5 * 7 * 4
    # The projector at the middle's 4x4 places: 16 -> 6 -> 6 -> 7 channels.
    assert plan.guide.projector_macs == 16 * (16 * 6 + 6 * 6 + 6 * 7)
    assert plan.guide.params == 16 * 6 + 6 + 6 * 6 + 6 + 6 * 7 + 7
    # 6 operations for each multiply-add of the projector, forward and backward, and 2 for each of the teacher's.
    of_step = 24 * (6 * plan.guide.projector_macs + 2 * plan.guide.teacher_macs) / 1e15
    of_model = step_petaflops(plan.quotas, plan.cost_K)
    for steps in (1, STOP, STOP + 1, STEPS):
        wanted = steps * of_model + min(steps, STOP) * of_step
        assert math.isclose(petaflops_after(planned, steps), wanted, rel_tol=1e-6)
        for stop_at in (STOP, min(1.0, STOP / steps)):
            own = replace(recipe.guide, stop_at=stop_at)
            assert steps_within(planned, own, wanted) == pytest.approx(steps, rel=1e-6)
    reported, plain = cost_report(recipe).petaflops, cost_report(replace(recipe, guide=None)).petaflops
    assert reported is not None
    assert plain is not None
    assert reported - plain == pytest.approx(STOP * of_step, rel=1e-5)
    assert to_mapping(recipe.guide)["stop_at"] == STOP
