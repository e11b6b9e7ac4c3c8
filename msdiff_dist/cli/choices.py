"""The class of all commands: what every option is checked for, and options whose values are names in a table.

The tables import torch and other heavy libraries. So they are loaded only by the commands that have such options, and
the others start fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperOption

from msdiff_dist.bounds import check_number, check_path, check_text
from msdiff_dist.errors import ConfigError


class Names:
    """Parser of an option, `typer.Option(parser=Names(load))`, that takes one of the names that `load` returns.

    Args:
        checked: refuse other names at once. False for names that a recipe's extensions may add: they are checked later,
            when the extensions have been imported.
    """

    __name__ = "NAME"  # click names the type of the option after its parser

    def __init__(self, load: Callable[[], Iterable[str]], checked: bool = True) -> None:
        self.load, self._checked = load, checked

    def __call__(self, value: str) -> str:
        if self._checked:
            names = list(self.load())
            if value not in names:
                raise typer.BadParameter(f"{value!r} is not one of {', '.join(map(repr, names))}.")
        return value


def datasets() -> Iterable[str]:
    """Data sets that can be prepared."""
    from msdiff_dist.data.make.datasets import DATASETS

    return DATASETS


def processes() -> Iterable[str]:
    """Diffusion processes."""
    from msdiff_dist.diffusion.processes import PROCESSES

    return PROCESSES


def solvers() -> Iterable[str]:
    """Solvers from noise to data."""
    from msdiff_dist.diffusion.solvers import SOLVERS

    return SOLVERS


def readable() -> Iterable[str]:
    """Formats that can be converted from."""
    from msdiff_dist.convert.formats import readable

    return readable()


def writable() -> Iterable[str]:
    """Formats that can be converted to."""
    from msdiff_dist.convert.formats import writable

    return writable()


def _check(field: str, value: Any) -> None:
    """Refuse what no command can use, whatever the option means."""
    if isinstance(value, (int, float)):
        check_number(field, value)
    elif isinstance(value, str):
        check_text(field, value)
    elif isinstance(value, Path):
        check_path(field, str(value))


# Parameters of verbs, by name, and the tables of their values.
_BY_PARAMETER: dict[str | None, Callable[[], Iterable[str]]] = {
    "dataset": datasets,
    "process": processes,
    "sampler": solvers,
    "from_format": readable,
    "to_format": writable,
}


class NamingCommand(TyperCommand):
    """A command whose help lists the names that its parameters take, and whose parameters are values one can use."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click does it.

        Raises:
            ConfigError: a number is not finite or too large, text has control characters, a path is empty or too long.
        """
        empty = "" in args and "." not in args  # pathlib reads an empty path as the current folder
        rest = super().parse_args(ctx, args)
        for parameter in self.params:
            given = ctx.params.get(parameter.name)
            metavar = str(parameter.metavar or "")
            named = metavar if metavar.isalpha() else str(parameter.name).upper()
            field = parameter.opts[0] if isinstance(parameter, TyperOption) else named
            for value in given if isinstance(given, (list, tuple)) else (given,):
                if empty and value == Path():
                    raise ConfigError(field, "", "is empty", "Name a file or folder; `.` is the current folder.")
                _check(field, value)
        return rest

    def get_params(self, ctx: Any) -> Any:
        """The parameters, with the names as metavariables."""
        found = super().get_params(ctx)
        for parameter in found:
            if parameter.name in _BY_PARAMETER and isinstance(parameter, (TyperOption, TyperArgument)):
                parameter.metavar = f"[{'|'.join(_BY_PARAMETER[parameter.name]())}]"
        return found
