"""A sign of life from every rank in the job's store, by which lost and hung ranks are named, whatever the backend does.

NCCL raises nothing when a rank is gone: its watchdog aborts the process after the time limit, without naming the rank.
So a thread of every rank writes a *beat*: its step, its phase, and for how long it has been in it. Rank 0 reads all
beats and judges them; its own beat carries the verdict. The others read rank 0's alone, so the load on the store is
linear in the number of ranks.

A beat that no longer changes is a process that is dead or frozen, or a host that is gone. A beat that changes while its
phase does not is a rank that hangs, if others wait for it.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch.distributed import Store

from msdiff_dist.distributed.facts import ranks_text
from msdiff_dist.distributed.progress import ENDED, START, Phase, Progress

PERIOD_S = 2.0
"""Seconds between two beats of a rank."""
_TICK_S = 0.5
GONE = "its process is dead or frozen, or its host is gone"


@dataclass(frozen=True, kw_only=True)
class Beat:
    """One sign of life.

    Attributes:
        count: number of this beat.
        step, phase, changes: of the rank's `Progress`.
        patient, waits: of the phase.
        stalled_s: seconds since the phase began.
        failed: the exception with which the rank leaves, None while it has none.
        alone: no other rank is expected to leave with the same exception at the same time.
    """

    count: int
    step: int
    phase: str
    changes: int
    patient: bool
    waits: bool
    stalled_s: float = 0.0
    failed: str | None = None
    alone: bool = True

    @property
    def standing(self) -> str:
        """ "last in step 41, phase 'reduce gradients'"."""
        return f"last in {f'step {self.step}, ' if self.step else ''}phase {self.phase!r}"


@dataclass(frozen=True, kw_only=True)
class WaitLimits:
    """How many seconds ranks wait for another one before they end the job.

    Attributes:
        step_s, start_s: for one that is alive: in a step, and in patient phases.
        silent_s, silent_patient_s: for the next beat of one that may be dead. The second is longer, because parsing a
            large index, imports and serializing hold Python's lock, without which no thread beats.
    """

    step_s: float
    start_s: float
    silent_s: float = 20.0
    silent_patient_s: float = 90.0

    def silence(self, patient: bool) -> float:
        """Seconds without a beat after which a rank is lost, in a patient phase or another."""
        return self.silent_patient_s if patient else self.silent_s


_NONE_YET = Beat(count=0, step=0, phase=START.name, changes=0, patient=START.patient, waits=START.waits)


class Watcher:
    """Finds lost and hung ranks in readings of their beats, one after another."""

    def __init__(self, limits: WaitLimits) -> None:
        self._limits = limits
        self._newest: dict[int, Beat] = {}
        self._silent_s: dict[int, float] = {}

    def verdict(self, beats: Mapping[int, Beat], passed_s: float) -> str | None:
        """Why the job must end, None while it need not.

        Args:
            beats: the newest beat of each watched rank.
            passed_s: seconds since the last reading, in which this process ran. Where the whole job was frozen, as when
                SLURM suspends it, no time has passed.
        """
        for rank, beat in beats.items():
            is_new = rank not in self._newest or beat.count != self._newest[rank].count
            self._silent_s[rank] = 0.0 if is_new else self._silent_s[rank] + passed_s
            self._newest[rank] = beat
        failed = [f"rank {rank} failed: {beat.failed}" for rank, beat in beats.items() if beat.failed and beat.alone]
        return "; ".join(failed) or self._lost() or self._hung()

    def _lost(self) -> str | None:
        lost: dict[str, list[int]] = {}  # by where they were last: a host that is gone takes many ranks with it
        for rank, beat in self._newest.items():
            silent = self._silent_s[rank]
            if beat.failed and silent >= self._limits.silent_s:
                return f"rank {rank} failed: {beat.failed}"
            if beat.phase != ENDED.name and silent >= self._limits.silence(beat.patient):
                lost.setdefault(f"no sign of life for {silent:.0f} s, {beat.standing}", []).append(rank)
        named = "; ".join(f"{ranks_text(ranks)}: {state}" for state, ranks in lost.items())
        return named and f"{named}: {GONE}"

    def _hung(self) -> str | None:
        running = {rank: beat for rank, beat in self._newest.items() if beat.phase != ENDED.name}
        behind = min((beat.changes for beat in running.values()), default=0)
        laggards = {rank: beat for rank, beat in running.items() if beat.changes == behind}
        if not laggards:
            return None
        first = next(iter(laggards.values()))
        stalled = min(beat.stalled_s for beat in laggards.values())
        if stalled < (self._limits.start_s if first.patient else self._limits.step_s):
            return None
        if len(laggards) < len(self._newest):
            return (
                f"{ranks_text(sorted(laggards))}: alive, but without progress for {stalled:.0f} s, {first.standing}; "
                "the other ranks wait"
            )
        if first.waits and len(laggards) > 1:
            return (
                f"every rank waits for the others for {stalled:.0f} s, {first.standing}: the network, or ranks whose "
                "collectives do not match"
            )
        return None


class Heartbeat:
    """Two threads of one rank: one writes beats and reads the store, the other notices when the store is silent.

    A call to the store has no time limit while its keeper is frozen, so one thread alone would be frozen with it.

    Args:
        connect: opens a connection of its own to the job's store: the process groups' may be busy waiting for a key.
        keeper: who keeps the store, for the error that it does not answer; None: this process.
        lost: called once, from a thread, with the reason why the job must end; it ends the process.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        rank: int,
        world_size: int,
        progress: Progress,
        limits: WaitLimits,
        *,
        keeper: str | None,
        lost: Callable[[str], None],
    ) -> None:
        self._connect, self._rank, self._world_size, self._progress = connect, rank, world_size, progress
        self._watcher, self._limits, self._keeper, self._lost = Watcher(limits), limits, keeper, lost
        self._stop, self._reported = threading.Event(), threading.Lock()
        self._failed: str | None = None
        self._alone = True
        self._count, self._answers = 0, 0
        self._seen_changes, self._stalled_s = -1, 0.0
        self._last = time.monotonic()
        self._threads = [threading.Thread(target=self._talk, name="heartbeat", daemon=True)]
        if keeper:
            self._threads.append(threading.Thread(target=self._watch_store, name="heartbeat-watch", daemon=True))

    def start(self) -> None:
        """Begin to beat and to watch."""
        for thread in self._threads:
            thread.start()

    def stop(self, failed: str | None = None, alone: bool = True) -> None:
        """Write a last beat, and watch no more.

        Args:
            failed: the exception with which this rank leaves; None: it has done its work.
            alone: no other rank is expected to leave with it. Otherwise the others end by themselves, or when they have
                not done so for `silent_s`.
        """
        self._failed, self._alone = failed, alone
        self._stop.set()
        self._progress.news.set()
        self._threads[0].join(_TICK_S if failed else PERIOD_S)

    def _talk(self) -> None:
        try:
            store = self._connect()
            if self._rank == 0:
                for rank in range(1, self._world_size):
                    store.set(beat_key(rank), "")  # so that reading them all waits for none
            last = False
            while not last:
                last = self._stop.is_set()
                self._exchange(store)
                self._progress.news.wait(0.0 if last else PERIOD_S)
                self._progress.news.clear()
        except RuntimeError:
            # The store is gone: with it no verdict can come. `_watch_store` notices that no answer does.
            return

    def _exchange(self, store: Store) -> None:
        """Write this rank's beat, read the others' or rank 0's, and judge them."""
        now = time.monotonic()
        # At most two periods: this process may have been frozen in between, together with those that it watches.
        passed, self._last = min(now - self._last, 2 * PERIOD_S), now
        own = self._beat(passed)
        if self._rank == 0:
            texts = store.multi_get([beat_key(rank) for rank in range(1, self._world_size)])
            beats = {rank: Beat(**json.loads(text)) if text else _NONE_YET for rank, text in enumerate(texts, 1)}
            verdict = self._watcher.verdict({0: own, **beats}, passed)
            store.set(beat_key(0), json.dumps({"beat": dataclasses.asdict(own), "verdict": verdict}))
        else:
            store.set(beat_key(self._rank), json.dumps(dataclasses.asdict(own)))
            first = json.loads(store.get(beat_key(0)))
            verdict = first["verdict"] or self._watcher.verdict({0: Beat(**first["beat"])}, passed)
        self._answers += 1
        if verdict and not self._stop.is_set():
            self._report(verdict)

    def _beat(self, passed: float) -> Beat:
        progress, phase = self._progress, self._progress.phase
        if self._stop.is_set():
            phase = ENDED
        self._stalled_s = self._stalled_s + passed if progress.changes == self._seen_changes else 0.0
        self._seen_changes = progress.changes
        self._count += 1
        return Beat(
            count=self._count,
            step=progress.step,
            phase=phase.name,
            changes=progress.changes,
            patient=phase.patient,
            waits=phase.waits,
            stalled_s=self._stalled_s,
            failed=self._failed,
            alone=self._alone,
        )

    def _watch_store(self) -> None:
        silent, answers, last = 0.0, 0, time.monotonic()
        while not self._stop.wait(_TICK_S):
            now = time.monotonic()
            silent, last = silent + min(now - last, 2 * _TICK_S), now
            if self._answers != answers:
                silent, answers = 0.0, self._answers
            phase: Phase = self._progress.phase
            if silent >= self._limits.silence(phase.patient):
                where = f"step {self._progress.step}, " if self._progress.step else ""
                return self._report(
                    f"{self._keeper} does not answer for {silent:.0f} s: {GONE} "
                    f"(rank {self._rank} is in {where}phase {phase.name!r})"
                )
        return None

    def _report(self, reason: str) -> None:
        if self._reported.acquire(blocking=False):
            self._lost(reason)


def beat_key(rank: int) -> str:
    """Where a rank's newest beat lies in the job's store. Rank 0's also holds the verdict."""
    return f"beat/{rank}"
