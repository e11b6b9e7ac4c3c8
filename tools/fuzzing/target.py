"""One parser under test, and what happens when it is given one input."""

from __future__ import annotations

import random
import re
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from msdiff_dist.errors import UserError

SECONDS = 2.0
"""CPU time in which an input of any content must be read or refused."""
MEMORY = 256 << 20
"""Bytes by which reading it may make the process larger."""
_PACKAGE = "/msdiff_dist/"


class DisagreementError(Exception):
    """Parser and library differ: one accepts what the other refuses, or they read different content."""


class TooLong(BaseException):
    """The parser used up its CPU time. No `Exception`, so that no parser takes it for its own."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parser.

    Attributes:
        name: of the target, as on the command line.
        read: gives it an input; the folder is for files that it must be read from.
        seeds: valid inputs, made by the package's own writers or by the format's library.
        hostile: inputs made to exhaust or to mislead: bombs, deep nesting, claims beyond the file.
        refuses: the exceptions that are documented for input that cannot be used.
        oracle: compares what was read with what the format's library reads; raises `DisagreementError`.
        mutate: changes an input so that lengths and checksums still hold.
        words: what such inputs are made of, for mutations of bytes.
        largest: bytes of the largest input that is tried.
        memory: bytes by which reading may make the process larger.
    """

    name: str
    read: Callable[[bytes, Path], Any]
    seeds: Callable[[], list[bytes]]
    hostile: Callable[[], Mapping[str, bytes]] = dict
    refuses: tuple[type[Exception], ...] = (UserError,)
    oracle: Callable[[bytes, Any], None] | None = None
    mutate: Callable[[random.Random, bytes], bytes] | None = None
    words: tuple[bytes, ...] = field(default=(), repr=False)
    largest: int = 1 << 15
    memory: int = MEMORY


@dataclass(frozen=True)
class Fault:
    """What is wrong with how an input was handled.

    Attributes:
        kind: the same for inputs that fail alike: the exception and the place in the package, or the limit.
        details: a traceback, or a measurement.
    """

    kind: str
    details: str


def examine(target: Target, data: bytes, folder: Path, seconds: float = SECONDS) -> Fault | None:
    """Give one input to a parser; returns what it did wrong, or None.

    Args:
        folder: scratch folder of this process.
        seconds: limit of CPU time; an endless loop is ended at ten times as many.
    """
    before, begun = memory_of("VmRSS"), time.process_time()
    _reset_peak()
    try:
        with warnings.catch_warnings(), _limited(10 * seconds):
            warnings.simplefilter("ignore")
            result = target.read(data, folder)
    except target.refuses:
        result, fault = None, None
    except TooLong:
        return Fault("endless", f"did not end within {10 * seconds:.0f} s of CPU time")
    except Exception as e:
        result, fault = None, _of_exception(e)
    else:
        fault = _compared(target, data, result) if target.oracle else None
    # Taken before the oracle would be better, but what a parser read must live until it is compared.
    spent, grown = time.process_time() - begun, memory_of("VmHWM") - before
    if fault is not None:
        return fault
    if spent > seconds:
        return Fault("slow", f"took {spent:.1f} s of CPU time, more than {seconds:.0f}")
    if grown > target.memory:
        return Fault("large", f"made the process {grown >> 20} MiB larger, more than {target.memory >> 20}")
    return None


def _compared(target: Target, data: bytes, result: Any) -> Fault | None:
    assert target.oracle is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.oracle(data, result)
    except DisagreementError as e:
        return Fault(f"disagreement: {re.sub(r'[^a-zA-Z ]+', '', str(e))[:50]}", str(e)[:2000])
    return None


def _of_exception(e: Exception) -> Fault:
    # Named by the innermost place in the package: what lies below it is a library's.
    frames = [f for f in traceback.extract_tb(e.__traceback__) if _PACKAGE in f.filename]
    where = f"{frames[-1].filename.rsplit(_PACKAGE, 1)[1]}:{frames[-1].name}" if frames else "outside"
    text = "".join(traceback.format_exception(e, limit=-12))
    return Fault(f"{type(e).__name__} in {where}", text[-4000:])


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `TooLong` in the block once it has used so much CPU time. Code of a library in C ends first."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _reset_peak() -> None:
    """Let the kernel count this process's peak from now on (proc(5): 5 in clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_of(name: str) -> int:
    """Bytes of this process as the kernel states them: VmRSS (now), VmHWM (at the peak), VmSize (mapped)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(name))
    return int(line.split()[1]) << 10
