"""Convert weights between formats: `msdiff convert` as a script. See --help."""

from __future__ import annotations

from command import run

from msdiff_dist.cli.convert import convert

if __name__ == "__main__":
    run(convert)
