"""Make the golden records again with the present code, and print what changed: python -m tests.golden.record

Records change in no other way. If one changed, CHANGELOG.md must say why.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.golden import records
from tests.golden.batches import batches_record
from tests.golden.cases import CASES, WORLDS
from tests.golden.draws import draws_record
from tests.golden.training import training_record

Make = Callable[[Path], Any]

# For each record, the function that makes it in an empty folder.
MAKERS: dict[str, Make] = {"draws": draws_record}
MAKERS |= {f"batches_{case}": partial(batches_record, case) for case in CASES}
MAKERS |= {f"training_{case}": partial(training_record, case, world_size=1) for case in WORLDS}


def main() -> None:
    records.RECORDS.mkdir(exist_ok=True)
    changed = False
    for name, make in MAKERS.items():
        with tempfile.TemporaryDirectory() as folder:
            now = make(Path(folder))
        try:
            before = records.load(name)
        except FileNotFoundError:
            before = {}
        found = records.differences(before, now)
        print(f"{name}: {'changed' if found else 'as it was'}")
        for line in found:
            print(f"  {line}")
        if found:  # else the last digits of this machine would replace those of another
            records.save(name, now)
            changed = True
    for stale in sorted({p.stem for p in records.RECORDS.glob("*.json")} - MAKERS.keys()):
        print(f"{stale}: no longer made, removed")
        (records.RECORDS / f"{stale}.json").unlink()
        changed = True
    if changed:
        print("Records changed: CHANGELOG.md must say why.", file=sys.stderr)


if __name__ == "__main__":
    main()
