"""A folder that knows what it is being filled with: the same command resumes it, another one is refused."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdiff_dist.config import differences
from msdiff_dist.errors import UserError
from msdiff_dist.files.atomic import atomic_write, partial_of, remove_partials, writing
from msdiff_dist.files.work_share import Part, alone, working

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True, kw_only=True)
class FolderClaim:
    """What one command holds of a folder that several processes may fill together.

    Args:
        folder: new, empty, or claimed before with the same settings.
        record: the JSON file inside that holds the settings. locks: the folder inside that holds the parts' locks.
        content: what is made, in a plural word.
        error: the class of errors. option: the command's, for the folder.
    """

    folder: Path
    record: Path
    locks: Path
    content: str
    error: type[UserError]
    option: str = "--out"

    @contextmanager
    def held(self, settings: Mapping[str, Any], part: Part, names: Container[str] | None = None) -> Iterator[None]:
        """Do this part of the work, alone; the folder is claimed for these settings, which JSON can hold.

        Args:
            names: of the files that may lie there; None: any, once the folder is claimed.

        Raises:
            UserError: the folder holds something else, or the same made otherwise, naming the settings that differ;
                another process does this part, or the folder is divided into another number of parts; or it cannot be
                written.
        """
        held = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        held = {name for name in held if (partial_of(name) or name) not in (self.locks.name, self.record.name)}
        if held and not self.record.exists():
            raise self._refused("holds something else", "Name a new folder, or empty it.")
        with writing(self.option, self.folder, self.error):
            try:
                with working(self.locks, part):
                    with alone(self.locks):
                        self._compare(settings)
                        for name in sorted(held):
                            if names is not None and (partial_of(name) or name) not in names:
                                raise self._refused(f"holds {name} too", "Remove it, or name a new folder.")
                        remove_partials(self.record.parent, [self.record.name])
                        if not self.record.exists():
                            atomic_write(self.record, json.dumps(settings, indent=1) + "\n")
                    yield
            except BlockingIOError:
                raise self._refused("is being filled by another process", "Wait for it.") from None

    def _compare(self, settings: Mapping[str, Any]) -> None:
        if not self.record.exists():
            return
        before, now = json.loads(self.record.read_text()), json.loads(json.dumps(settings))
        changed = [f"{name} was {_SHORT.repr(a)}, now {_SHORT.repr(b)}" for name, a, b in differences(before, now)]
        if changed:
            remedy = "Give the command that it was begun with, or name a new folder."
            raise self._refused(f"holds {self.content} made otherwise ({'; '.join(changed)})", remedy)

    def _refused(self, problem: str, remedy: str) -> UserError:
        return self.error(self.option, str(self.folder), problem, remedy)
