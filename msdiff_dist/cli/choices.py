"""Options whose values are names in a table, such as `--sampler`.

The tables import torch and other heavy libraries. So they are loaded only by the commands that have such options, and
the others start fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperOption


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


# Parameters of verbs, by name, and the tables of their values.
_BY_PARAMETER: dict[str | None, Callable[[], Iterable[str]]] = {
    "dataset": datasets,
    "process": processes,
    "sampler": solvers,
    "from_format": readable,
    "to_format": writable,
}


class NamingCommand(TyperCommand):
    """A command whose help lists the names that its parameters take."""

    def get_params(self, ctx: Any) -> Any:
        """The parameters, with the names as metavariables."""
        found = super().get_params(ctx)
        for parameter in found:
            if parameter.name in _BY_PARAMETER and isinstance(parameter, (TyperOption, TyperArgument)):
                parameter.metavar = f"[{'|'.join(_BY_PARAMETER[parameter.name]())}]"
        return found
