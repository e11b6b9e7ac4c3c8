"""The golden records notice a change of what is trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.mutations import PACKAGE, PURPOSES, ROOT, UNRECORDED, MutationError, all_changes, purposes

# One of each kind: order, draws, quotas, routing, loss, averages.
SOME = ["purpose 'noise'", "window order", "rounding of quotas", "alignment of routed rows", "importance in the loss"]
SOME += ["limit of the decay"]


def tried(*names: str) -> str:
    command = [sys.executable, "-m", "tests.golden.mutations", *names]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_some_changes_are_seen() -> None:
    assert f"{len(SOME)} changes tried, {len(SOME)} seen" in tried(*SOME)


@pytest.mark.slow
def test_every_change_is_seen() -> None:
    changes = len(all_changes(ROOT / PACKAGE))
    assert changes > 40
    assert f"{changes} changes tried, {changes} seen" in tried()


def test_a_new_purpose_needs_a_record(tmp_path: Path) -> None:
    package = tmp_path / PACKAGE
    package.mkdir()
    lines = ["from x.randomness import generator as g", *(f"g(0, {p!r})" for p in [*PURPOSES, *UNRECORDED, "new"])]
    (package / "__init__.py").write_text("\n".join(lines))
    with pytest.raises(MutationError, match="'new' has no golden record"):
        all_changes(package)


def test_purposes_are_found_through_parameters_and_must_be_text() -> None:
    start = "from a.randomness import generator\ndef draw(n, purpose):\n  return generator(0, purpose, n)\n"
    assert [p for p, _ in purposes(start + "draw(1, 'one')\nx.draw(2, purpose='two')")] == ["one", "two"]
    assert [p for p, _ in purposes("from a import randomness\nrandomness.generator(0, 'three')")] == ["three"]
    assert not purposes("def f(generator):\n  return generator(1, 'no purpose')")
    with pytest.raises(MutationError, match="not plain text"):
        purposes(start + "draw(1, 'a' + b)")
    with pytest.raises(MutationError, match="from nowhere"):
        purposes(start)
