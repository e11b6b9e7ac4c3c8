from __future__ import annotations

from msdiff_dist.distributed.engines import Turn
from msdiff_dist.training.stage_progress import StageProgress


def test_a_decoder_steps_when_it_has_enough_samples() -> None:
    progress, taken = StageProgress([12, 4, 8], 10), []
    for _ in range(6):
        turns = progress.turns([12, 4, 8])
        taken.append([turn.steps for turn in turns])
        progress.take(turns)
    assert [[int(steps) for steps in of_stage] for of_stage in zip(*taken, strict=True)] == [
        [1, 1, 1, 1, 1, 1],
        [0, 0, 1, 0, 0, 1],
        [0, 1, 0, 1, 0, 1],
    ]
    assert (progress.samples, progress.steps, progress.gathered) == ([72, 24, 48], [6, 2, 3], [0, 0, 0])
    assert progress.elapsed == [1, 3, 2]


def test_a_stage_without_samples_waits() -> None:
    progress = StageProgress([8, 8], 1, stored=True)
    for quotas in ([16, 0], [16, 0], [0, 16]):
        progress.take(progress.turns(quotas))
    assert progress.turns([16, 0])[1] == Turn(0, 0, False)
    assert (progress.elapsed, progress.waited) == ([0, 3], [1, 0])


def test_counters_are_kept_and_follow_from_the_step_where_they_are_not() -> None:
    progress = StageProgress([12, 4], 10, stored=True)
    for _ in range(2):
        progress.take(progress.turns([12, 4]))
    again = StageProgress([12, 4], 10, stored=True)
    again.restore(2, progress.fields(), {})
    assert again.fields() == progress.fields()
    again.restore(2, progress.fields(), {"stages.0.": 2})  # an optimizer that begins anew has no steps
    assert again.own_steps() == {"stages.0.": 0, "stages.1.": 0}
    older = StageProgress([12, 4], 10, stored=True)
    older.restore(5, {}, {"stages.1.": 3})
    assert (older.samples, older.steps, older.gathered) == ([60, 20], [5, 2], [0, 0])
    assert StageProgress([12, 4]).fields() == {}
