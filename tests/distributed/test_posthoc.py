"""Power-function averages: kept on shards, resumed, and made from snapshots for a length chosen after training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from msdiff_dist.checkpoint.layout import complete_checkpoints, step_of
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.errors import CheckpointError
from msdiff_dist.export.export import export
from msdiff_dist.testing import run_distributed
from tests.distributed.tiny_run import ADAM, recipe_of, trained

pytestmark = pytest.mark.distributed

STEPS, EVERY = 12, 2
OTHER = {"parallel__zero_shared": 3, "parallel__zero_decoders": 2}


def train(world_size: int, path: Path, stops: list[int], lengths: list[float], **changes: object) -> None:
    recipe = recipe_of(ADAM, ema__power={"snapshot_every": EVERY, "lengths": lengths}, **changes)
    run_distributed(trained, world_size, world_size, recipe, path, stops)


def snapshots(run: Path) -> list[CheckpointReader]:
    return [CheckpointReader(p) for p in complete_checkpoints(run / "ema_snapshots")]


def test_shards_resume_and_export(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(1, one, [*range(1, STEPS + 1)], [0.05, 0.07, 0.1])
    train(2, two, [5, 9], [0.05, 0.1], **OTHER)
    expected = {int(p.name[5:]): CheckpointReader(p) for p in complete_checkpoints(one / "checkpoints")}
    names = expected[1].names()

    # Each average weighs step k by k^(gamma + 1) - (k - 1)^(gamma + 1).
    share = (torch.arange(STEPS + 1, dtype=torch.float64) / STEPS) ** (6.9372 + 1)
    for name in names[:3]:
        weighed = sum((share[k] - share[k - 1]) * expected[k].tensor("param", name).double() for k in expected)
        torch.testing.assert_close(expected[STEPS].tensor("ema_0.1", name).double(), weighed, rtol=1e-4, atol=1e-6)

    # Back to step 5: the snapshots of steps 6 and 8 are made again, those before stay.
    before = {r.index.step: r.tensor("ema_0.05", names[0]) for r in snapshots(two)}
    assert [*before] == [2, 4, 6, 8]
    shutil.rmtree(two / "checkpoints/step_00000009")
    (two / "ema_snapshots/step_00000008").rename(two / "ema_snapshots/step_00000009")
    train(2, two, [STEPS], [0.05, 0.1], **OTHER)
    assert [step_of(r.folder) for r in snapshots(two)] == [2, 4, 6, 8, 10, 12]
    again = {r.index.step: r.tensor("ema_0.05", names[0]) for r in snapshots(two)}
    assert all(torch.equal(again[step], tensor) for step, tensor in before.items())
    for reader in snapshots(two):
        assert reader.kinds == ["ema_0.05", "ema_0.1"]
        for name in names:
            for kind in reader.kinds:
                tracked = expected[reader.index.step].tensor(kind, name)
                torch.testing.assert_close(reader.tensor(kind, name), tracked, rtol=0, atol=1e-5)

    # A length between: against the one that was tracked, relative to how far averages of this length move.
    with pytest.raises(CheckpointError, match=r"--step = 3: .*It has: 2, 4, 5, 6, 8, 10, 12"):
        export(two, tmp_path / "none", step=3, ema_length=0.07)
    export(two, tmp_path / "out", ema_length=0.07)
    made = load_file(tmp_path / "out/model.safetensors")
    error, moved = (
        torch.stack([(a(name) - expected[STEPS].tensor("ema_0.07", name)).square().sum() for name in names]).sum()
        for a in (made.__getitem__, lambda n: expected[STEPS].tensor("ema_0.05", n))
    )
    print(f"squared error {error:.3g}, of the nearest tracked length {moved:.3g}")
    assert error < 0.01 * moved
    export(two, tmp_path / "held", step=8, ema_length=0.1)
    held = snapshots(two)[3]
    for name, tensor in load_file(tmp_path / "held/model.safetensors").items():
        torch.testing.assert_close(tensor, held.tensor("ema_0.1", name), rtol=0, atol=1e-7)
