"""`msdiff extract` as a script. See --help."""

from __future__ import annotations

from command import run

from msdiff_dist.cli.extract import extract

if __name__ == "__main__":
    run(extract)
