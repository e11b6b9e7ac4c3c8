"""`msdiff merge` as a script. See --help."""

from __future__ import annotations

from command import run

from msdiff_dist.cli.merge import merge

if __name__ == "__main__":
    run(merge)
