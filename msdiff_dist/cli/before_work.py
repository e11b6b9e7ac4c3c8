"""Commands checked before they are submitted as jobs: by their own parsers, and by their own checks before work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import typer

Verb = TypeVar("Verb", bound=Callable[..., Any])

_only_checking: ContextVar[bool] = ContextVar("only_checking", default=False)


class _CheckedError(Exception):
    """Ends a verb whose checks are done when nothing more is wanted of it."""


def checks_first(verb: Verb) -> Verb:
    """Mark a verb that calls `work_begins` when its checks are done, before it writes or computes anything."""
    verb.checks_first = True  # type: ignore[attr-defined]
    return verb


def only_checking() -> bool:
    """Whether the verb runs for its checks alone, perhaps on a machine without the GPUs of the job."""
    return _only_checking.get()


def work_begins() -> None:
    """Called by a verb of `checks_first`: does not return if only its checks are wanted."""
    if only_checking():
        raise _CheckedError


def check_command(app: typer.Typer, words: Sequence[str]) -> None:
    """Refuse `msdiff WORDS` as the command itself would: by its parser, and where it is marked so by its checks.

    Raises:
        UsageError of Typer: there is no such verb, or it does not take these options or values.
        UserError: of a check of the verb.
    """
    command: Any = typer.main.get_command(app)
    name: str | None = "msdiff"
    rest, context = list(words), None
    while isinstance(command, typer.core.TyperGroup):
        context = command.make_context(name, rest, parent=context)
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    context = command.make_context(name, rest, parent=context)
    if getattr(command.callback, "checks_first", False):
        token = _only_checking.set(True)
        try:
            with context:
                command.invoke(context)
        except _CheckedError:
            return
        finally:
            _only_checking.reset(token)
