"""Every option and argument of every command, fed with what no command can use: refused by its name, before work."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import typer
from typer.models import ArgumentInfo, OptionInfo
from typer.testing import CliRunner

from msdiff_dist.cli.main import app
from msdiff_dist.errors import UserError

BAD: dict[Any, tuple[str, ...]] = {
    float: ("nan", "-inf", "1e39"),
    int: (str(10**20), "1e20", "nan"),
    str: ("a\x01b", "a\0b"),
    Path: ("a\x01b", "a\0b", "x" * 300, "a/" * 3000),
}
NAMED = {"dataset": "digits", "from_format": "msdiff", "to_format": "diffusers"}
"""Arguments that take a name out of a table."""


def commands(group: typer.Typer, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Callable[..., object]]]:
    for command in group.registered_commands:
        assert command.callback is not None
        yield (*path, command.name or command.callback.__name__.replace("_", "-")), command.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from commands(inner.typer_instance, (*path, str(inner.name)))


COMMANDS = dict(commands(app))


def plain(hint: Any) -> tuple[Any, Any]:
    """The type of one value of a parameter, and typer's description of the parameter."""
    kind, *about = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    while get_origin(kind) in (Union, types.UnionType, list):
        kind = next(arg for arg in get_args(kind) if arg is not type(None))
    return kind, next((a for a in about if isinstance(a, (ArgumentInfo, OptionInfo))), None)


def written(name: str, about: Any, value: str) -> list[str]:
    """A parameter as the command line takes it."""
    if isinstance(about, ArgumentInfo):
        return [value]
    # typer takes the first of `Option("--from")` for a default.
    declared = [word for word in (about.default, *(about.param_decls or ())) if str(word).startswith("--")]
    return [*(declared or ["--" + name.rstrip("_").replace("_", "-")])[:1], value]


def needed(name: str, kind: Any) -> str:
    if name in NAMED:
        return NAMED[name]
    return str(get_args(kind)[0]) if get_origin(kind) is Literal else "1" if kind in (int, float) else "x"


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_values_that_no_command_can_use(path: tuple[str, ...]) -> None:
    function = COMMANDS[path]
    hints, parameters = get_type_hints(function, include_extras=True), inspect.signature(function).parameters
    described = {name: plain(hints[name]) for name in parameters}
    required = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty]
    for name, (kind, about) in described.items():
        if kind not in BAD or getattr(about, "parser", None):
            continue
        for value in BAD[kind]:
            line = {n: written(n, described[n][1], needed(n, described[n][0])) for n in required}
            line[name] = written(name, about, value)
            options = [word for words in line.values() if len(words) == 2 for word in words]
            arguments = [word for words in line.values() if len(words) == 1 for word in words]
            message = refusal([*path, *options, "--", *arguments])
            shown = str(about.metavar or "")
            metavar = shown if shown.isalpha() else name
            option = metavar if isinstance(about, ArgumentInfo) else written(name, about, value)[0]
            assert option.lower() in message.lower(), f"{path} {option} {value!r}: {message}"


def refusal(words: list[str]) -> str:
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, UserError):
        assert "\n" not in str(result.exception)
        return str(result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    return " ".join(result.output.split())
