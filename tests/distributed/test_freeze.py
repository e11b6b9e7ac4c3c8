"""`train.freeze`: what is frozen stays as it is bit by bit, and the rest trains as in one plain process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from msdiff_dist.apps.train.plan import plan_run
from msdiff_dist.apps.train.prediction import predict
from msdiff_dist.apps.train.rehearsal import ranks_to_rehearse
from msdiff_dist.apps.train.rehearsal_report import report
from msdiff_dist.apps.train.rehearsed_rank import rehearse_rank
from msdiff_dist.apps.train.trainer import Trainer
from msdiff_dist.checkpoint.compare import compare
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.errors import RunFolderError
from msdiff_dist.export.export import export
from msdiff_dist.recipe import recipe_from, recipe_mapping
from msdiff_dist.testing import run_distributed
from msdiff_dist.training.run_folder import RunFolder
from tests.distributed.reference import train_reference
from tests.distributed.tiny_run import ADAM, open_run, recipe_of, trained

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


FROZEN = ["shared", "stages.1", "stages.2"]


def fine_tuning(path: Path) -> dict[str, Any]:
    """A recipe that trains stage 0 of the model that the run `base` trained."""
    base = str(path / "base/checkpoints/step_00000002")
    power = {"snapshot_every": 1, "lengths": [0.05, LENGTH]}
    return recipe_of(
        CLIPPED, train__freeze=FROZEN, train__init_from=base, train__precision="bf16", ema__power=power,
        train__global_batch_size=8,
    )  # fmt: skip


def in_zero_3(path: Path) -> dict[str, Any]:
    """One that freezes parts of the encoder, which DeepSpeed shards."""
    freeze = ["shared.input_blocks", "stages.1"]
    return recipe_of(
        CLIPPED, train__freeze=freeze, train__init_from=str(path / "base/checkpoints/step_00000002"),
        train__precision="bf16", parallel__zero_shared=3,
    )  # fmt: skip


def check_network(run: Trainer, base: CheckpointReader) -> None:
    """The frozen weights that this rank computes with are those of `base`, rounded."""
    engines = {"shared.": run.engines.shared, **{f"stages.{k}.": e for k, e in run.engines.stages.items()}}
    for prefix, engine in engines.items():
        assert engine is not None
        for name, p in engine.module.named_parameters():
            if p.requires_grad:
                continue
            wanted = base.tensor("ema", prefix + name).bfloat16()
            if hasattr(p, "ds_tensor"):  # a range of it, padded
                shard = p.ds_tensor.numel()
                wanted = wanted.flatten()[run.env.rank * shard :][:shard]
                assert torch.equal(p.ds_tensor[: wanted.numel()], wanted)
            else:
                assert torch.equal(p, wanted)


def resumed_bitwise(rank: int, mapping: dict[str, Any], run: Path, at: int, end: int) -> None:
    """Train to `end` and save at `at`; from there again; compare losses and the network's own weights."""
    losses, weights = trained(rank, 2, mapping, run, [at, end])
    if rank == 0:
        shutil.rmtree(run / f"checkpoints/step_{end:08d}")
    dist.barrier()
    losses_again, weights_again = trained(rank, 2, mapping, run, [end])
    assert losses_again == losses[at - end :]
    assert all(torch.equal(weights[name], weight) for name, weight in weights_again.items())


def fine_tune(rank: int, path: Path) -> dict[str, int]:
    """Train `base`, fine-tune it, branch off without frozen parts. Bytes of optimizer state of fine-tuning, by part."""
    trained(rank, 2, recipe_of(CLIPPED), path / "base", [2])
    resumed_bitwise(rank, fine_tuning(path), path / "tuned", 2, 4)
    resumed_bitwise(rank, in_zero_3(path), path / "zero_3", 1, 2)
    base = CheckpointReader(path / "base/checkpoints/step_00000002")
    with open_run(rank, 2, in_zero_3(path), path / "zero_3") as run:
        check_network(run, base)
    with open_run(rank, 2, fine_tuning(path), path / "tuned") as run:
        assert [*run.engines.stages] == [0]
        check_network(run, base)
        state = {
            prefix: sum(t.nbytes for t in [*s.flats(), *(t for m in s.moments() for t in m.values())])
            for prefix, s in run.state.shards.items()
        }
    if rank == 0:
        shutil.copytree(path / "tuned/checkpoints", path / "branch/checkpoints")
    dist.barrier()
    branch = recipe_of(CLIPPED, train__freeze=["stages.1"], train__precision="bf16", train__global_batch_size=8)
    resumed_bitwise(rank, branch, path / "branch", 5, 6)
    return state


@pytest.mark.slow
def test_one_stage_is_fine_tuned_and_a_branch_trains_more(tmp_path: Path) -> None:
    state = run_distributed(fine_tune, 2, tmp_path)
    recipe = recipe_from(fine_tuning(tmp_path))
    assert [{prefix for prefix, count in of_rank.items() if count} for of_rank in state] == [{"stages.0."}] * 2
    planned, whole = (
        [rank["peak_bytes"] for rank in predict(r, 2, on_gpus=False)["ranks"]]
        for r in (recipe, replace(recipe, train=replace(recipe.train, freeze=())))
    )
    assert [p["optimizer"] for p in planned] == pytest.approx([sum(of_rank.values()) for of_rank in state], rel=0.01)
    for less, more in zip(planned, whole, strict=True):
        assert less["total"] < more["total"]
        assert less["optimizer"] < 0.6 * more["optimizer"]

    base = CheckpointReader(tmp_path / "base/checkpoints/step_00000002")
    tuned = CheckpointReader(tmp_path / "tuned/checkpoints/step_00000004")
    export(tmp_path / "tuned", tmp_path / "exported", ema_length=0.07)
    exported = load_file(tmp_path / "exported/model.safetensors")
    for name in base.names():
        before, after = base.tensor("ema", name), tuned.tensor("param", name)
        if name.startswith("stages.0."):
            assert not torch.equal(after, before)
            continue
        # Although the networks of both ranks have them in bf16, and where no rank computes them.
        assert torch.equal(after, before)
        assert torch.equal(tuned.tensor("ema", name), before)
        assert torch.equal(exported[name], before)
    zero_3 = CheckpointReader(tmp_path / "zero_3/checkpoints/step_00000002")
    for name in zero_3.names():
        is_frozen = name.startswith(("shared.input_blocks.", "stages.1."))
        assert torch.equal(zero_3.tensor("param", name), base.tensor("ema", name)) == is_frozen, name
        assert zero_3.holds("exp_avg", name) != is_frozen

    # Adam's first step is at most the learning rate: with moments of zero at step 5 it would be three times that.
    branch = CheckpointReader(tmp_path / "branch/checkpoints/step_00000005")
    assert branch.index.optimizer_began == {"shared.": 4, "stages.2.": 4}
    moved = {n: (branch.tensor("param", n) - tuned.tensor("param", n)).abs().max() for n in base.names()}
    assert max(moved.values()) < 1.1 * CLIPPED["lr"]
    assert max(size for name, size in moved.items() if name.startswith("shared.")) > 0.9 * CLIPPED["lr"]
    assert not any(size for name, size in moved.items() if name.startswith("stages.1."))
    assert {d.kind for d in compare(tuned, branch)} == {"param", "ema", "exp_avg", "exp_avg_sq"}
    for d in compare(tuned, branch):
        assert d.kind in ("param", "ema") or d.name.startswith("stages.0."), "both have its moments"


def test_another_layout_resumes_and_another_freeze_does_not(tmp_path: Path) -> None:
    mapping = recipe_of(CLIPPED, train__freeze=NORMS_AND_BLOCK_3)
    losses = run_distributed(trained, 3, 3, mapping | {"parallel": {"zero_shared": 3}}, tmp_path / "run", [2])[0][0]
    losses += run_distributed(trained, 1, 1, mapping, tmp_path / "run", [4])[0][0]
    reference = train_reference(recipe_from(mapping), 4, is_frozen=is_norm_or_in_block_3)
    assert losses == pytest.approx(reference.losses, rel=TOLERANCE)
    folder = RunFolder(tmp_path / "folder")
    folder.open(recipe_mapping(recipe_from(mapping)))
    folder.close()
    with pytest.raises(RunFolderError, match=r"train\.freeze"):
        folder.check(recipe_mapping(recipe_from(recipe_of(CLIPPED))))


def test_frozen_parts_communicate_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # DeepSpeed wants it
    recipe = recipe_from(recipe_of(CLIPPED, train__freeze=["shared", "stages.1"], train__global_batch_size=48))
    plan = plan_run(recipe, 8)
    assert plan.placement.group(1) == ()
    found = report(8, [rehearse_rank(recipe, plan, r) for r in ranks_to_rehearse(plan.placement)])
    assert found["orders_agree"]
    calls = {row["group"]: row["calls"] for row in found["ranks"]["by_group"]}
    assert calls == {"stage 0": 2, "stage 2": 2, "shared": 0, "routing": 1, "agreement": 1}
