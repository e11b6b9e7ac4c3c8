"""`msdiff classifier train` as a script. See --help."""

from __future__ import annotations

from command import run

from msdiff_dist.cli.classifier import train

if __name__ == "__main__":
    run(train)
