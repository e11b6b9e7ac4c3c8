"""Options that take a name of a table. The tables import heavy libraries, so only a value or the help asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperOption


class Names:
    """Parser of an option, `typer.Option(parser=Names(load))`, that takes one of the names that `load` gives.

    Args:
        checked: whether other names are refused at once; else what they are for refuses them, once a recipe's
            extensions are known.
    """

    __name__ = "NAME"

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
        found = super().get_params(ctx)
        for parameter in found:
            if parameter.name in _BY_PARAMETER and isinstance(parameter, (TyperOption, TyperArgument)):
                parameter.metavar = f"[{'|'.join(_BY_PARAMETER[parameter.name]())}]"
        return found
