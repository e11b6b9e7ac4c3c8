"""Folders with a record of what they are being filled with: the same command resumes, another one is refused."""

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
from msdiff_dist.files.json_text import parse_mapping
from msdiff_dist.files.work_share import Part, alone, working

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True, kw_only=True)
class FolderClaim:
    """A command's claim to a folder, which several processes may fill together.

    Attributes:
        folder: folder to fill; new, empty, or claimed before with the same settings.
        record: JSON file in `folder` that holds the settings.
        locks: folder in `folder` for the parts' lock files.
        content: what the folder is filled with, as a plural noun for messages.
        error: class of the errors raised.
        option: the command's option that names the folder, for messages.
    """

    folder: Path
    record: Path
    locks: Path
    content: str
    error: type[UserError]
    option: str = "--out"

    @contextmanager
    def held(self, settings: Mapping[str, Any], part: Part, names: Container[str] | None = None) -> Iterator[None]:
        """Claim the folder for these settings, and be the only process that does this part, for the block.

        Args:
            settings: what decides the folder's content; must be fit for JSON.
            names: names that files of the folder may have; None for any, once the folder is claimed.

        Raises:
            UserError: the folder holds other files, or content of other settings, which are named; another process does
                this part, or the work is being done in another number of parts; or the folder cannot be written.
        """
        present = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        present = {name for name in present if (partial_of(name) or name) not in (self.locks.name, self.record.name)}
        if present and not self.record.exists():
            raise self._refused("holds something else", "Name a new folder, or empty it.")
        with writing(self.option, self.folder, self.error):
            try:
                with working(self.locks, part):
                    # Of processes that start at once, one writes the record and the others compare with it.
                    with alone(self.locks):
                        self._compare(settings)
                        for name in sorted(present):
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
        # By way of JSON, tuples become lists and keys become strings, as in the record.
        try:
            before, now = parse_mapping(self.record.read_bytes()), json.loads(json.dumps(settings))
        except ValueError as e:
            raise self._refused(f"holds a {self.record.name} that {e}", "Name a new folder.") from None
        changed = [f"{name} was {_SHORT.repr(a)}, now {_SHORT.repr(b)}" for name, a, b in differences(before, now)]
        if changed:
            remedy = "Run the command that began it, or name a new folder."
            raise self._refused(f"holds {self.content} made otherwise ({'; '.join(changed)})", remedy)

    def _refused(self, problem: str, remedy: str) -> UserError:
        return self.error(self.option, str(self.folder), problem, remedy)
