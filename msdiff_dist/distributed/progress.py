"""What a rank is doing: its step and its phase, which the loop sets and the heartbeat reads."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A part of a run that the ranks enter in the same order.

    Attributes:
        name: as errors quote it.
        patient: it may take long on a rank that is well: start-up, saves, previews.
        waits: it ends on no rank before every rank has entered it.
    """

    name: str
    patient: bool = False
    waits: bool = False


START = Phase("start-up", patient=True)
PLACE = Phase("start-up: stages placed", patient=True)
FIND = Phase("start-up: checkpoint found", patient=True)
BUILD = Phase("start-up: engines built", patient=True)
RESTORE = Phase("start-up: checkpoint restored", patient=True)
OPEN = Phase("start-up: data opened", patient=True)
READ = Phase("read data")
EXCHANGE = Phase("exchange samples", waits=True)
COMPUTE = Phase("forward and backward")
REDUCE = Phase("reduce gradients", waits=True)
UPDATE = Phase("optimizer step")
RECORD = Phase("write metrics")
SAVE = Phase("save", patient=True)
VALIDATE = Phase("validation", patient=True)
PREVIEW = Phase("preview", patient=True)
EVALUATE = Phase("evaluation", patient=True)
FINISH = Phase("finish", patient=True)
ENDED = Phase("ended", patient=True)


class Progress:
    """The step and phase of this rank. The loop sets them; a thread may read them at any time.

    Attributes:
        step: the step in progress, counted from 1; 0 before the first.
        phase: what this rank is doing.
        changes: how often the phase has changed. Phases come in the same order on every rank, so the rank with the
            smallest number is the one that the others wait for.
        news: set when patience begins or ends, which the other ranks should know before they judge.
    """

    def __init__(self) -> None:
        self.step = 0
        self.phase = START
        self.changes = 0
        self.news = threading.Event()

    def enter(self, phase: Phase) -> None:
        """Begin a phase."""
        is_news = phase.patient != self.phase.patient
        self.phase = phase
        self.changes += 1
        if is_news:
            self.news.set()
