"""Describe Python packages by sizes of files and functions, annotations, docstrings and comments.

Example: python tools/code_statistics.py msdiff_dist
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from pathlib import Path

DIRECTIVES = ("# fmt", "# type", "# noqa")  # comments for programs
MANY_PARAMETERS = 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    """Print a row for each folder named on the command line."""
    print("| | files | file median / max lines | functions | median / p95 / max lines | annotated |", end="")
    print(f" docstring (public) | comment lines | functions with >= {MANY_PARAMETERS} parameters |")
    print("|---" * 9 + "|")
    for folder in sys.argv[1:] or sys.exit(__doc__):
        print(row(Path(folder)))


def row(folder: Path) -> str:
    """The table's row of one package."""
    texts = [path.read_text() for path in sorted(folder.rglob("*.py"))]
    if not texts:
        sys.exit(f"{folder} holds no Python files. Name a package's folder.")
    lines = [text.count("\n") for text in texts]
    functions = [node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, Function)]
    lengths = sorted((f.end_lineno or f.lineno) - f.lineno + 1 for f in functions)
    public = [f for f in functions if not f.name.startswith("_")]
    sizes = f"{statistics.median(lengths):g} / {lengths[int(0.95 * len(lengths))]} / {lengths[-1]}"
    cells = [
        folder.name,
        len(texts),
        f"{statistics.median(lines):g} / {max(lines)}",
        len(functions),
        sizes,
        f"{sum(f.returns is not None for f in functions) / len(functions):.0%}",
        f"{documented(functions):.0%} ({documented(public):.0%})",
        f"{sum(map(comments, texts)) / sum(lines):.1%}",
        sum(parameters(f) >= MANY_PARAMETERS for f in functions),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def documented(functions: list[Function]) -> float:
    """Share of the functions that have a docstring."""
    return sum(ast.get_docstring(f) is not None for f in functions) / max(1, len(functions))


def comments(text: str) -> int:
    """Comments for readers in a source text."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(t.type == tokenize.COMMENT and not t.string.startswith(DIRECTIVES) for t in tokens)


def parameters(function: Function) -> int:
    """Number of a function's parameters, `self` and `cls` not counted."""
    a = function.args
    return sum(p.arg not in ("self", "cls") for p in (*a.posonlyargs, *a.args, *a.kwonlyargs))


if __name__ == "__main__":
    main()
