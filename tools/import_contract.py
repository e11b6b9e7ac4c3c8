"""A contract for import-linter: one library, or one module of it, is imported in the named places only.

import-linter knows an external library by its first name only, so it cannot distinguish `torch.distributed` from
`torch`; and its own contracts list the modules that may not import something, not those that may.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class OnlyIn(Contract):
    """Broken by a module outside `allowed` that imports `library`, and by an allowed place that does not.

    Type annotations count as imports too: a place that needs the library's types depends on it.
    """

    library = fields.StringField()
    allowed = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Read the imports of every module of the root packages."""
        lines = [
            (module, line)
            for package in self.session_options["root_packages"]
            for module, path in _modules(package)
            for line in _imports(path, str(self.library))
        ]
        places = [str(p) for p in self.allowed]  # type: ignore[attr-defined]
        outside = [(m, line) for m, line in lines if not any(_is_in(m, p) for p in places)]
        unused = [p for p in places if not any(_is_in(m, p) for m, _ in lines)]
        return ContractCheck(kept=not outside and not unused, metadata={"outside": outside, "unused": unused})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Report where the library is imported, and which places may import it but do not."""
        places = ", ".join(map(str, self.allowed))  # type: ignore[call-overload]
        for module, line in check.metadata["outside"]:
            output.print_error(f"{module}:{line} imports {self.library}, which only {places} may")
        for place in check.metadata["unused"]:
            output.print_error(f"{place} may import {self.library} and does not: remove it from the list")


def _is_in(module: str, place: str) -> bool:
    return module == place or module.startswith(place + ".")


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} cannot be imported"
    root = Path(str(spec.origin)).parent
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(path: Path, library: str) -> Iterator[int]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        if any(_is_in(name, library) for name in names):
            yield node.lineno
