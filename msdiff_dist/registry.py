"""Tables from names in recipes or on the command line to what they stand for, and how other packages add to them.

Another package calls `TABLE.add("name", entry)` when a module of it is imported. A recipe lists the module under
`extensions`, or an installed package declares it as an entry point of the group `msdiff_dist.extensions`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from msdiff_dist.errors import ConfigError, collecting, did_you_mean, raise_all

T = TypeVar("T")
GROUP = "msdiff_dist.extensions"
"""Group of entry points by which installed packages name modules that add to tables."""


class Table(Mapping[str, T]):
    """Entries of one kind by name, in the order in which help and error messages list them.

    `Annotated[str, TABLE]` is the type of a recipe field that holds one of the names. Every access imports the modules
    that installed packages declare, once; `add` does not, so that those modules can call it.

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
            ConfigError: there is none of this name; the error names the choices.
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

    # A table is equal to itself only, whatever it holds. So it can be hashed, as type hints are.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


def import_extensions(mapping: Any) -> None:
    """Import the modules that a recipe's plain data, or an export's, lists under `extensions`.

    Raises:
        ConfigError: one is no module's name, or cannot be imported here.
    """
    listed = mapping.get("extensions") if isinstance(mapping, Mapping) else None
    errors: list[ConfigError] = []
    for name in listed if isinstance(listed, (list, tuple)) else ():
        with collecting(errors):
            if not isinstance(name, ConfigError):  # one is reported when the recipe is built
                _import_extension(str(name))
    raise_all(errors)


def _import_extension(name: str) -> None:
    if len(name) > 255 or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError("extensions", name, "is not the name of a module", "Write it as my_package.my_module.")
    try:
        importlib.import_module(name)
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
