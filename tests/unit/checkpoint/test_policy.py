from __future__ import annotations

import pytest

from msdiff_dist.checkpoint.policy import CheckpointConfig, kept
from msdiff_dist.errors import ConfigError

LOSSES = {10: 0.9, 20: 0.3, 30: 0.5, 40: 0.3, 50: 0.4}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CheckpointConfig(every=10, keep_last=2), {40, 50}),
        (CheckpointConfig(every=10, keep_last=9), {10, 20, 30, 40, 50}),
        (CheckpointConfig(every=10, keep_last=1, keep_every=20), {20, 40, 50}),
        (CheckpointConfig(every=10, keep_last=1, at=(20, 60)), {20, 50}),
        (CheckpointConfig(every=10, keep_last=1, keep_best=True), {40, 50}),  # of two as good, the newer
    ],
)
def test_kept(config: CheckpointConfig, expected: set[int]) -> None:
    assert kept(LOSSES, config) == expected


def test_due_every_so_often_and_at_named_steps() -> None:
    assert [s for s in range(1, 25) if CheckpointConfig(every=10, at=(3, 20)).due(s)] == [3, 10, 20]
    assert [s for s in range(1, 25) if CheckpointConfig(every=0, at=(3,)).due(s)] == [3]
    with pytest.raises(ConfigError, match="counted from 1"):
        CheckpointConfig(at=(0,))


def test_best_ignores_unknown_losses() -> None:
    assert kept({1: None, 2: None}, CheckpointConfig(every=1, keep_last=1, keep_best=True)) == {2}
    assert kept({}, CheckpointConfig(every=1)) == set()


@pytest.mark.parametrize("field", ["every", "keep_every", "keep_last"])
def test_refused(field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CheckpointConfig(**{field: -1})
    assert caught.value.field == field


def test_keep_every_must_meet_checkpoints() -> None:
    with pytest.raises(ConfigError, match="Use 30"):
        CheckpointConfig(every=10, keep_every=25)
