"""What the system says of this machine's CPUs."""

from __future__ import annotations

from pathlib import Path


def cpuinfo() -> str:
    """Text of /proc/cpuinfo; empty on systems other than Linux, which have none."""
    listing = Path("/proc/cpuinfo")
    return listing.read_text() if listing.exists() else ""
