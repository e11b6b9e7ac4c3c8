"""How Sphinx builds this folder: `make docs`. Warnings are errors there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from msdiff_dist import __version__

EXAMPLE = re.compile(r"^(?:<[^>]*>)?Example:(?:</span>)? (.+(?:\n.+)*)\n", re.MULTILINE)
BUILD = Path(__file__).parents[1] / "build" / "docs"

project, author, copyright = "msdiff_dist", "msdiff_dist contributors", "msdiff_dist contributors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"msdiff_dist {release}"
html_theme_options = {"top_of_page_buttons": []}
default_role = "code"
smartquotes = False  # it would make dashes of the hyphens of options

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # docs/recipe.md and typer's pages skip levels of headings

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False


def _write_commands() -> None:
    """The reference of the command line, by typer itself from the functions that it calls."""
    command = [sys.executable, "-m", "typer", "msdiff_dist.cli.main", "utils", "docs", "--name", "msdiff"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = EXAMPLE.sub(lambda found: f"```console\n$ {' '.join(found[1].split())}\n```\n", text)
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "commands.md").write_text(text.replace("# `msdiff`\n", "", 1))


_write_commands()
