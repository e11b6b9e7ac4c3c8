"""Run one function as a command whose errors are reported as `msdiff` reports them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from msdiff_dist.errors import MsdiffError, UserError


def run(function: Callable[..., Any]) -> None:
    """Run `function` with the options of the command line.

    Exit status: 0 done, 2 an error that the user can correct, 1 any other failure.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    try:
        app()
    except MsdiffError as e:
        print(f"error {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, UserError) else 1)
