"""Tables of what a name in a recipe or on the command line stands for, and how other packages add to them.

Another package adds at import, `TABLE.add("name", entry)`, in a module that a recipe lists under `extensions`, or that
an installed package declares as an entry point of the group `msdiff_dist.extensions`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from msdiff_dist.errors import ConfigError, did_you_mean

T = TypeVar("T")
GROUP = "msdiff_dist.extensions"


class Table(Mapping[str, T]):
    """Entries of one kind by name, in the order of the help and of error messages.

    `Annotated[str, TABLE]` types a recipe field that holds one of the names. Looking something up first imports what
    installed packages declare; `add` does not, so that they can add.

    Args:
        kind: what an entry is, in the singular, for messages.
    """

    def __init__(self, kind: str, entries: Mapping[str, T]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def add(self, name: str, entry: T) -> None:
        """Put an entry under a new name.

        Raises:
            ConfigError: the name is taken.
        """
        if name in self._entries:
            problem = f"there is a {self.kind} of this name already"
            raise ConfigError("extensions", name, problem, "Add yours under another name.")
        self._entries[name] = entry

    def choose(self, field: str, name: str) -> T:
        """The entry that `field` asks for.

        Raises:
            ConfigError: there is none of this name; it lists those that there are.
        """
        if name not in self:
            raise ConfigError(field, name, "is not one of the choices", did_you_mean(name, self))
        return self[name]

    def __getitem__(self, name: str) -> T:
        _import_installed()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        _import_installed()
        return iter(self._entries)

    def __len__(self) -> int:
        _import_installed()
        return len(self._entries)

    # A table is itself alone, not its content: so it can stand in type hints, which are hashed.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


def import_extensions(mapping: Any) -> None:
    """Import the modules that a recipe's plain data, or an export's, lists under `extensions`.

    Raises:
        ConfigError: one is no module's name, or cannot be imported here.
    """
    listed = mapping.get("extensions") if isinstance(mapping, Mapping) else None
    for name in listed if isinstance(listed, (list, tuple)) else ():
        if not all(part.isidentifier() for part in str(name).split(".")):
            raise ConfigError("extensions", name, "is not the name of a module", "Write it as my_package.my_module.")
        try:
            importlib.import_module(str(name))
        except ImportError as e:
            remedy = "Install its package where this runs, or put its folder on PYTHONPATH."
            raise ConfigError("extensions", name, f"cannot be imported ({e})", remedy) from e


_asked_installed = False


def _import_installed() -> None:
    """Import the entry points of installed packages, once in a process."""
    global _asked_installed
    if _asked_installed:
        return
    _asked_installed = True  # before the imports: they may look things up themselves
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except ImportError as e:
            package = point.dist.name if point.dist else point.value
            remedy = f"Repair or remove the package {package}."
            raise ConfigError("extensions", point.value, f"cannot be imported ({e})", remedy) from e
