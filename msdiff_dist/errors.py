"""The package's exceptions. A `UserError` is the user's to mend and ends a command with exit status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class MsdiffError(Exception):
    """Base of every error this package raises on purpose."""


class UserError(MsdiffError):
    """Bad input: the error names the field, its value, what is wrong and what to do.

    Args:
        field: dotted recipe field, command-line option or file (`stages.boundaries`, `--nproc`).
        value: the value found there.
        problem: what is wrong with it, as a clause.
        remedy: what to do, as an imperative sentence.
    """

    def __init__(self, field: str, value: Any, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        super().__init__(f"{field} = {value!r}: {problem}. {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by `args`, the message alone. These cross processes, so all four are passed, and notes too.
        return type(self), (self.field, self.value, self.problem, self.remedy), self.__dict__


class ConfigError(UserError):
    """A field of a recipe, or an option of a command, has a wrong value or contradicts another."""


class DataError(UserError):
    """Shards or samples are missing, corrupt or of the wrong kind."""


class PlacementError(UserError):
    """The stages cannot be placed on the given number of ranks."""


class RunFolderError(UserError):
    """The run folder cannot be used for this run."""


class CheckpointError(UserError):
    """A checkpoint or other file of weights cannot be written, read or used."""


class TrainingError(MsdiffError):
    """Training stopped: a loss that is not finite, a rank that died."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`Did you mean 'x'?` for the nearest choice, else the list of choices."""
    known = sorted(choices)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else f"Choose from: {', '.join(known)}."
