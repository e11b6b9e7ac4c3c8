"""`msdiff recipes`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def recipes(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the recipes, ablation files and cluster files that come with the package; `msdiff init` writes one to edit.

    Example: msdiff recipes --json
    """
    from msdiff_dist.shipped import shipped_files

    files = shipped_files()
    if as_json:
        typer.echo(json.dumps([{"name": f.name, "kind": f.kind, "description": f.description} for f in files]))
        return
    width = max(len(f.name) for f in files) + 2
    for file in files:
        typer.echo(f"{file.name:{width}}{file.description}")
