"""Write requirements.lock: the versions of constraints.txt, each with the sha256 of what Linux x86-64 installs.

It asks pip what it would install, for every Python in PYTHONS. Run it after a change of constraints.txt, with the first
of these Pythons.

Example: python tools/lock.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12")
HEADER = """\
# Written by tools/lock.py (`make lock`) from constraints.txt; installed by `make setup-locked`.
# Hashes are those of the files that Python {pythons} on Linux x86-64 installs.
"""


def main() -> None:
    if sys.version_info[:2] != tuple(map(int, PYTHONS[0].split("."))):
        sys.exit(f"run it with Python {PYTHONS[0]}")
    pins = pinned((ROOT / "constraints.txt").read_text())
    hashes: dict[str, set[str]] = defaultdict(set)
    files = would_install(pins.values())
    for python in PYTHONS[1:]:
        # For another Python than its own, pip resolves wheels only. A source distribution is the same for all of them.
        wheels = [pins[name] for name, (file, _) in files.items() if file.endswith(".whl")]
        options = ["--python-version", python, "--only-binary", ":all:", "--target", "none"]
        for name, (_, digest) in would_install(wheels, *options).items():
            hashes[name].add(digest)
    for name, (_, digest) in files.items():
        hashes[name].add(digest)
    lines = [HEADER.format(pythons=" and ".join(PYTHONS))]
    for name, pin in pins.items():
        lines.append(" \\\n    ".join([pin, *(f"--hash=sha256:{digest}" for digest in sorted(hashes[name]))]) + "\n")
    (ROOT / "requirements.lock").write_text("".join(lines))


def pinned(constraints: str) -> dict[str, str]:
    """`name==version` lines by normalised name."""
    return {normalised(line.split("==")[0]): line for line in constraints.split()}


def normalised(name: str) -> str:
    """The one spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def would_install(pins: Iterable[str], *options: str) -> dict[str, tuple[str, str]]:
    """The file that pip would install for each pin, and its sha256, by normalised name."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder) / "wanted.txt", Path(folder) / "report.json"
        wanted.write_text("\n".join(pins))
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "-qq"]
        subprocess.run([*pip, "--report", str(report), "-r", str(wanted), *options], check=True)
        found = json.loads(report.read_text())["install"]
    return {
        normalised(entry["metadata"]["name"]): (
            entry["download_info"]["url"],
            entry["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for entry in found
    }


if __name__ == "__main__":
    main()
