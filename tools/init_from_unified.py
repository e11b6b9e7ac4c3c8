"""`msdiff grow` as a script. See --help."""

from __future__ import annotations

from command import run

from msdiff_dist.cli.grow import grow

if __name__ == "__main__":
    run(grow)
