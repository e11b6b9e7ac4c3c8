"""A run that begins from a checkpoint of another: exact, alone with its folder, and the same after every kill."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from msdiff_dist.apps.train.branch import Branch, Origin
from msdiff_dist.checkpoint.layout import complete_checkpoints
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.distributed.agree import on_rank_0
from msdiff_dist.errors import CheckpointError, RunFolderError
from msdiff_dist.recipe import comparable_mapping, recipe_from, recipe_mapping
from msdiff_dist.testing import run_distributed
from msdiff_dist.training.run_folder import RunFolder
from tests.distributed.reference import train_reference
from tests.distributed.tiny_run import ADAM, open_run, recipe_of, trained

pytestmark = pytest.mark.distributed

Result = tuple[list[float], dict[str, torch.Tensor]]


def branch_and_train(
    rank: int, world_size: int, mapping: dict[str, Any], old: Path, new: Path, stops: list[int], step: int | None = None
) -> Result:
    """What a rank of `msdiff train --run-dir old --branch new` does, with the checkpoints `stops`."""
    recipe, folder, branch = recipe_from(mapping), RunFolder(new, comparable_mapping), Branch(old, step)

    def opened() -> None:
        branch.check(recipe, new)
        folder.open(recipe_mapping(recipe), lambda: branch.begin(recipe, folder, world_size, None) and None)

    on_rank_0(opened)
    result = trained(rank, world_size, mapping, new, stops)
    folder.close()
    return result


def train(world_size: int, mapping: dict[str, Any], path: Path, stops: list[int]) -> list[Result]:
    """Train the run in `path` as `msdiff train` does."""
    folder = RunFolder(path, comparable_mapping)
    folder.open(recipe_mapping(recipe_from(mapping)))
    folder.close()
    return run_distributed(trained, world_size, world_size, mapping, path, stops)


def branched(world_size: int, mapping: dict[str, Any], old: Path, new: Path, stops: list[int]) -> list[Result]:
    return run_distributed(branch_and_train, world_size, world_size, mapping, old, new, stops)


def content(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of change of every file, and the time of every folder."""
    return {
        str(p.relative_to(folder)): (
            hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "",
            p.stat().st_mtime_ns,
        )
        for p in sorted(folder.rglob("*"))
    }


def same(a: list[Result], b: list[Result]) -> bool:
    return all(
        x[0] == y[0] and all(torch.equal(w, y[1][n]) for n, w in x[1].items()) for x, y in zip(a, b, strict=True)
    )


LESS = {**ADAM, "lr": 1e-4, "weight_decay": 0.1}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_branch_trains_as_the_resumed_run_would(tmp_path: Path, world_size: int) -> None:
    """Bit by bit with the same recipe and with other rates; the old run does not change by a byte."""
    old = tmp_path / "old"
    train(world_size, recipe_of(ADAM), old, [2])
    before = content(old)
    for name, optimizer in (("same", ADAM), ("less", LESS)):
        new = branched(world_size, recipe_of(optimizer), old, tmp_path / name, [4])
        assert content(old) == before
        shutil.copytree(old, tmp_path / f"resumed_{name}")
        assert same(new, train(world_size, recipe_of(optimizer), tmp_path / f"resumed_{name}", [4]))
        origin = Origin.of(tmp_path / name)
        assert origin is not None
        assert (origin.run, origin.step, origin.data) == (str(old), 2, "goes on")
        index = old / "checkpoints/step_00000002/checkpoint.json"
        assert origin.digest == hashlib.sha256(index.read_bytes()).hexdigest()


def rated(rank: int, world_size: int, mapping: dict[str, Any], path: Path, stop: int) -> list[tuple[float, float]]:
    """Train to `stop` at the rate that the run has; the rate and the loss of each step."""
    found = []
    with open_run(rank, world_size, mapping, path) as run:
        while run.state.step < stop:
            found.append((run.rate, run.step(run.rate).loss))
        run.save()
    return found


def rated_branch(rank: int, world_size: int, mapping: dict[str, Any], old: Path, new: Path, stop: int) -> list[Any]:
    branch_and_train(rank, world_size, mapping, old, new, [2])
    return rated(rank, world_size, mapping, new, stop)


def test_a_rate_for_each_sample_is_that_of_the_batch_on_any_ranks(tmp_path: Path) -> None:
    of_run = recipe_of(ADAM)  # batches of 24
    per_sample = {**ADAM, "lr": ADAM["lr"] / 24, "lr_per": "sample"}

    def recipe(batch: int, accumulation: int, **changes: Any) -> dict[str, Any]:
        sizes = {"micro_batch_size": batch, "global_batch_size": None, "gradient_accumulation_steps": accumulation}
        return recipe_of(per_sample, **{f"train__{name}": value for name, value in sizes.items()}, **changes)

    reference = train_reference(recipe_from(of_run), 4).losses
    run = tmp_path / "run"
    train(2, recipe(12, 1), run, [0])
    for world_size, mapping, stop in ((2, recipe(12, 1), 2), (1, recipe(6, 4), 3), (3, recipe(8, 1), 4)):
        ((of_rank, *_),) = [run_distributed(rated, world_size, world_size, mapping, run, stop)]
        assert [rate for rate, _ in of_rank] == [pytest.approx(ADAM["lr"])] * len(of_rank)
        losses = [loss for _, loss in of_rank]
        assert losses == pytest.approx(reference[stop - len(losses) : stop], rel=1e-5)
    with pytest.raises(CheckpointError, match="global batch of 24"):
        run_distributed(rated, 1, 1, recipe(12, 1), run, 5)
    # A branch may change the batch, and with it the rate.
    ((of_branch, *_),) = [run_distributed(rated_branch, 1, 1, recipe(48, 1), run, tmp_path / "branch", 5)]
    assert [rate for rate, _ in of_branch] == [pytest.approx(2 * ADAM["lr"])]


def test_changes_hold_from_the_checkpoints_step_on_other_ranks_too(tmp_path: Path) -> None:
    """A run resumed on two ranks, and a branch on two, against one process that changes its recipe at step 2."""
    first = recipe_of(ADAM)
    later = recipe_of(
        {**LESS, "grad_clip": 0.05}, ema__halflife_images=100.0, ema__decay=None, train__condition_dropout=0.5,
        diffusion__discrete={"min_snr_gamma": 2.0},
    )  # fmt: skip
    expected = train_reference(recipe_from(first), 4, later=(2, recipe_from(later)))
    train(1, first, tmp_path / "run", [2])
    of_branch = branched(2, later, tmp_path / "run", tmp_path / "branch", [4])[0][0]
    resumed = train(2, later, tmp_path / "run", [4])[0][0]
    assert resumed == pytest.approx(expected.losses[2:], rel=1e-5)
    assert of_branch == pytest.approx(expected.losses[2:], rel=1e-5)
    for run in ("run", "branch"):
        reader = CheckpointReader(tmp_path / run / "checkpoints/step_00000004")
        for name in reader.names():
            torch.testing.assert_close(reader.tensor("param", name), expected.state[name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(reader.tensor("ema", name), expected.ema[name], rtol=1e-5, atol=1e-6)


def first_batch(rank: int, world_size: int, mapping: dict[str, Any], path: Path) -> int:
    with open_run(rank, world_size, mapping, path) as run:
        return next(run.feed.next_batch()).batch


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"train__seed": 3}, "train.seed was 0, now 3"),
        pytest.param({"data__lanes": 6}, "data.lanes was 12, now 6", marks=pytest.mark.slow),
        pytest.param({"train__global_batch_size": 12}, "the global batch was 24, now 12", marks=pytest.mark.slow),
    ],
)
def test_another_order_of_samples_begins_anew_and_is_kept(
    tmp_path: Path, changes: dict[str, Any], because: str
) -> None:
    mapping = recipe_of(ADAM, **changes)
    train(1, recipe_of(ADAM), tmp_path / "old", [3])
    whole = branched(1, mapping, tmp_path / "old", tmp_path / "whole", [3, 5])
    origin = Origin.of(tmp_path / "whole")
    assert origin is not None
    assert (origin.data, origin.because) == ("begins anew", [because])
    shutil.rmtree(tmp_path / "whole/checkpoints/step_00000005")
    assert run_distributed(first_batch, 1, 1, mapping, tmp_path / "whole") == [0]
    branched(1, mapping, tmp_path / "old", tmp_path / "parts", [4])
    assert run_distributed(first_batch, 1, 1, mapping, tmp_path / "parts") == [1]
    parts = branched(1, mapping, tmp_path / "old", tmp_path / "parts", [5])
    assert parts[0][0] == whole[0][0][1:]
    assert same([([], parts[0][1])], [([], whole[0][1])])
    # A branch of the branch goes on in that order.
    again = branched(1, mapping, tmp_path / "whole", tmp_path / "again", [5])
    assert same(again, [(whole[0][0], whole[0][1])])


def test_another_optimizer_begins_with_moments_of_zero_and_is_resumed_exactly(tmp_path: Path) -> None:
    mapping = recipe_of({**ADAM, "name": "adam", "weight_decay": 0.0}, ema__power={"snapshot_every": 100})
    train(1, recipe_of(ADAM), tmp_path / "old", [3])
    whole = branched(1, mapping, tmp_path / "old", tmp_path / "whole", [5])
    origin = Origin.of(tmp_path / "whole")
    assert origin is not None
    assert [note.split(":")[0] for note in origin.notes] == ["the optimizer is another", "ema_0.05, ema_0.1"]
    parts = branched(1, mapping, tmp_path / "old", tmp_path / "parts", [4])
    parts = branched(1, mapping, tmp_path / "old", tmp_path / "parts", [5])
    assert parts[0][0] == whole[0][0][1:]
    assert same([([], parts[0][1])], [([], whole[0][1])])


def test_a_kill_while_branching_is_made_good_by_the_same_command(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    train(1, recipe_of(ADAM), old, [2])
    expected = branched(1, recipe_of(LESS), old, new, [3])
    whole = tmp_path / "whole"
    shutil.copytree(new, whole)
    branched_only = new / "checkpoints/step_00000002"

    def killed(*kept: str) -> None:
        """Leave in `new` what was there at some moment before its recipe was written."""
        shutil.rmtree(new)
        for name in kept:
            source = whole / name
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, new / name) if source.is_dir() else shutil.copyfile(source, new / name)

    for kept in (
        ["logs", ".lock"],
        [".lock", "branched_from.json"],
        [".lock", "branched_from.json", "checkpoints/step_00000002"],
    ):
        killed(*kept)
        assert same(branched(1, recipe_of(LESS), old, new, [3]), expected)
    killed(".lock", "branched_from.json")
    with pytest.raises(RunFolderError, match=r"was to become a branch of .*old"):
        RunFolder(new, comparable_mapping).open(recipe_mapping(recipe_from(recipe_of(LESS))))
    killed(".lock", "branched_from.json", "checkpoints/step_00000002")
    branched_only.rename(new / "checkpoints/.step_00000002.partial")
    assert same(branched(1, recipe_of(LESS), old, new, [3]), expected)
    shutil.rmtree(old)  # no longer needed
    assert [len(losses) for losses, _ in branched(1, recipe_of(LESS), old, new, [4])] == [1]


def test_a_checkpoint_that_is_not_intact_is_passed_over(tmp_path: Path) -> None:
    old = tmp_path / "old"
    train(1, recipe_of(ADAM), old, [2, 3, 4])
    (old / "checkpoints/step_00000004/checkpoint.json").write_text("{")
    file = next((old / "checkpoints/step_00000003").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    before = content(old)
    branched(1, recipe_of(ADAM), old, tmp_path / "new", [3])
    origin = Origin.of(tmp_path / "new")
    assert origin is not None
    assert origin.step == 2
    assert [note.split()[0] for note in origin.notes] == ["step_00000004", "step_00000003"]
    assert content(old) == before
    for folder in complete_checkpoints(old / "checkpoints"):
        (folder / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match="step_00000002"):
        Branch(old).check(recipe_from(recipe_of(ADAM)), tmp_path / "third")


def test_what_cannot_be_branched_is_refused_by_name(tmp_path: Path) -> None:
    old, new, recipe = tmp_path / "old", tmp_path / "new", recipe_from(recipe_of(ADAM))
    with pytest.raises(RunFolderError, match="no such run to branch from"):
        Branch(old).check(recipe, new)
    untrained = RunFolder(old)
    untrained.open(recipe_mapping(recipe))
    untrained.close()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint to branch from"):
        Branch(old).check(recipe, new)
    train(1, recipe_of(ADAM), tmp_path / "trained", [1, 2])
    old = tmp_path / "trained"
    before = content(old)
    for inside, words in ((old, "is the run to branch from"), (old / "new", "lie in each other")):
        with pytest.raises(RunFolderError, match=words):
            Branch(old).check(recipe, inside)
    with pytest.raises(CheckpointError, match=r"--branch-from = 7.*It has: 1, 2"):
        Branch(old, 7).check(recipe, new)
    for changes, words in (
        ({"model__decoder_channels": [12, 8, 8]}, r"model\.decoder_channels was \[12, 8, 4\], now \[12, 8, 8\]"),
        ({"model__num_heads": 1}, r"model\.num_heads was 2, now 1"),
        ({"stages__boundaries": [300, 631]}, r"stages\.boundaries was \[442(\.0)?, 631(\.0)?\], now \[300"),
    ):
        with pytest.raises(RunFolderError, match=words):
            Branch(old).check(recipe_from(recipe_of(ADAM, **changes)), new)
    with pytest.raises(RunFolderError, match="is a run of its own, not the branch"):
        Branch(old).check(recipe, tmp_path / "old")
    run_distributed(branch_and_train, 1, 1, recipe_of(ADAM), old, new, [2], 1)
    Branch(old).check(recipe, new)
    Branch(old, 1).check(recipe, new)
    with pytest.raises(RunFolderError, match=r"is a branch of .*trained at step 1, not the branch of .* at step 2"):
        Branch(old, 2).check(recipe, new)
    with pytest.raises(RunFolderError, match=r"is a branch of .*trained at step 1, not the branch of .*elsewhere"):
        Branch(tmp_path / "elsewhere").check(recipe, new)
    assert content(old) == before


def test_a_run_that_is_being_trained_can_be_branched(tmp_path: Path) -> None:
    old = tmp_path / "old"
    train(1, recipe_of(ADAM), old, [2])
    folder = RunFolder(old, comparable_mapping)
    folder.open(recipe_mapping(recipe_from(recipe_of(ADAM))))
    branched(1, recipe_of(ADAM), old, tmp_path / "new", [3])
    folder.close()
    origin = Origin.of(tmp_path / "new")
    assert origin is not None
    assert origin.notes == ["that run is being trained by another process"]
