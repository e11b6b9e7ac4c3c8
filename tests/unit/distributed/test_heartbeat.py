"""Who is lost and who hangs, told from readings of the ranks' beats."""

from __future__ import annotations

from dataclasses import replace

from msdiff_dist.distributed.heartbeat import Beat, WaitLimits, Watcher
from msdiff_dist.distributed.progress import COMPUTE, ENDED, REDUCE, SAVE, Phase

LIMITS = WaitLimits(step_s=600, start_s=1800, silent_s=20, silent_patient_s=90)


def beat(phase: Phase, count: int = 0, **more: object) -> Beat:
    known = {"step": 41, "changes": 100, **more}
    return Beat(count=count, phase=phase.name, patient=phase.patient, waits=phase.waits, **known)  # type: ignore[arg-type]


def after(seconds: int, beats: list[Beat], silent: set[int], passed: float = 1.0) -> str | None:
    """The first verdict in `seconds` readings, in which every rank but the silent ones gives new beats."""
    watcher = Watcher(LIMITS)
    for second in range(seconds):
        new = {r: b if r in silent else replace(b, count=second) for r, b in enumerate(beats)}
        if verdict := watcher.verdict(new, passed):
            return verdict
    return None


def test_a_silent_rank_is_named_with_its_last_step_and_phase() -> None:
    beats = [beat(REDUCE), beat(REDUCE), beat(COMPUTE, changes=99)]
    assert after(20, beats, silent={2}) is None
    verdict = after(40, beats, silent={2})
    assert verdict is not None
    assert verdict.startswith("rank 2: no sign of life for 20 s, last in step 41, phase 'forward and backward'")
    whole_host = after(40, [beat(REDUCE)] * 12, silent=set(range(8, 12)))
    assert whole_host is not None
    assert whole_host.startswith("ranks 8-11: no sign of life")


def test_saves_and_start_up_may_be_silent_for_longer() -> None:
    beats = [beat(REDUCE), beat(SAVE)]
    assert after(60, beats, silent={1}) is None
    assert "rank 1: no sign of life for 90 s" in str(after(120, beats, silent={1}))


def test_ranks_that_have_ended_may_be_silent() -> None:
    assert after(500, [beat(SAVE), beat(ENDED)], silent={1}) is None


def test_a_job_frozen_as_a_whole_has_lost_nobody() -> None:
    beats = [beat(REDUCE), beat(COMPUTE)]
    assert after(500, beats, silent={1}, passed=0.0) is None


def test_a_live_rank_without_progress_is_named_if_others_wait_for_it() -> None:
    waiting = beat(REDUCE, changes=101, stalled_s=700.0)
    hung = beat(COMPUTE, stalled_s=700.0)
    verdict = after(2, [waiting, hung, waiting], silent=set())
    assert verdict is not None
    assert verdict.startswith("rank 1: alive, but without progress for 700 s, last in step 41, phase 'forward and")
    assert after(2, [waiting, replace(hung, stalled_s=599.0)], silent=set()) is None
    assert after(2, [waiting, beat(SAVE, stalled_s=700.0)], silent=set()) is None, "a save may take longer"
    assert after(2, [hung, hung], silent=set()) is None, "each computes, and none waits"


def test_ranks_that_all_wait_for_each_other() -> None:
    waiting = beat(REDUCE, stalled_s=601.0)
    assert "every rank waits for the others for 601 s" in str(after(2, [waiting, waiting], silent=set()))


def test_a_rank_that_failed_is_named_at_once_unless_all_are_to_fail_with_it() -> None:
    failed = beat(ENDED, failed="RuntimeError: planted")
    assert after(1, [beat(REDUCE), failed], silent=set()) == "rank 1 failed: RuntimeError: planted"
    together = replace(failed, alone=False)
    assert after(20, [beat(REDUCE), together], silent={1}) is None
    assert after(40, [beat(REDUCE), together], silent={1}) == "rank 1 failed: RuntimeError: planted"
