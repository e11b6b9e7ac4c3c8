"""The package's exceptions. A `UserError` is the user's to mend and ends a command with exit status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

_MOST_SHOWN, _MOST_ERRORS = 400, 50  # in a message: characters of a value; errors


class MsdiffError(Exception):
    """Base of every error this package raises on purpose."""


class UserError(MsdiffError):
    """Bad input: the error names the field, its value, what is wrong and what to do.

    Args:
        field: dotted recipe field, command-line option or file (`stages.boundaries`, `--nproc`).
        value: the value found there.
        problem: what is wrong with it, as a clause.
        remedy: what to do, as an imperative sentence.

    Attributes:
        place: where the value was given, `recipe.yaml:12` or `on the command line`; None if that is not known.
    """

    place: str | None = None

    def __init__(self, field: str, value: Any, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        super().__init__(_on_one_line(f"{field} = {_shown(value)}: {problem}. {remedy}"))

    def __str__(self) -> str:
        return f"{self.place}: {super().__str__()}" if self.place else super().__str__()

    def within(self, prefix: str) -> Self:
        """The same error, with `prefix` before the field's name."""
        error = type(self)(f"{prefix}{self.field}", self.value, self.problem, self.remedy)
        error.place = self.place
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by `args`, the message alone. These cross processes, so all four are passed, and notes too.
        return type(self), (self.field, self.value, self.problem, self.remedy), self.__dict__


class ConfigError(UserError):
    """A field of a recipe, or an option of a command, has a wrong value or contradicts another."""

    @property
    def errors(self) -> tuple[ConfigError, ...]:
        """Each error by itself: one, unless this is a `ConfigErrors`."""
        return (self,)


class ConfigErrors(ConfigError):  # noqa: N818 - it is several
    """Several fields are wrong. `field`, `value`, `problem` and `remedy` are those of the first error.

    Args:
        errors: two or more.
    """

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        first = errors[0]
        super().__init__(first.field, first.value, first.problem, first.remedy)
        self._errors = tuple(errors)

    @property
    def errors(self) -> tuple[ConfigError, ...]:
        return self._errors

    def within(self, prefix: str) -> Self:
        return type(self)([e.within(prefix) for e in self._errors])

    def __str__(self) -> str:
        shown = [str(e) for e in self._errors[:_MOST_ERRORS]]
        rest = [f"and {len(self._errors) - _MOST_ERRORS} more"] if len(self._errors) > _MOST_ERRORS else []
        return "\n  ".join([f"{len(self._errors)} errors", *shown, *rest])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._errors,), self.__dict__


@contextmanager
def collecting(errors: list[ConfigError]) -> Iterator[None]:
    """Put the ConfigError that ends the block, or each of several in one, into `errors`, and go on after the block."""
    try:
        yield
    except ConfigError as e:
        errors.extend(e.errors)


def raise_all(errors: Iterable[ConfigError]) -> None:
    """Raise these errors as one, each problem of a field once; return if there are none.

    Raises:
        ConfigError: the only one, or a ConfigErrors of several.
    """
    different = list({(e.field, _shown(e.value), e.problem, e.place): e for e in errors}.values())
    if different:
        raise different[0] if len(different) == 1 else ConfigErrors(different)


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


def nearest(word: str, choices: Iterable[str]) -> list[str]:
    """The choice that `word` is probably meant to be, alone; empty if none is like it."""
    return difflib.get_close_matches(word, sorted(choices), n=1, cutoff=0.6)


def _shown(value: Any) -> str:
    """`repr` of a value, without the middle of what is very long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of more than some thousand digits
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    if len(text) <= _MOST_SHOWN:
        return text
    return f"{text[: _MOST_SHOWN // 2]} ... {text[-_MOST_SHOWN // 4 :]} ({len(text)} characters)"


def _on_one_line(text: str) -> str:
    """The text with line ends, control characters and lone surrogates as Python writes them in strings."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`Did you mean 'x'?` for the nearest choice, else the list of choices."""
    known = sorted(choices)
    near = nearest(word, known)
    return f"Did you mean {near[0]!r}?" if near else f"Choose from: {', '.join(known)}."
