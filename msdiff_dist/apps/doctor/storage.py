"""Disks: space, kind of file system, speed of a small file, locks and clock."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from msdiff_dist.apps.doctor.finding import Finding, ok, problem, text_of, warning

GIB = 2**30
_SAMPLE = 32 * 2**20
_NETWORK = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs", "pvfs2", "glusterfs", "9p"}
_IN_MEMORY = {"tmpfs", "ramfs"}


def checks_of(folder: Path) -> tuple[Callable[[object], Iterator[Finding]], ...]:
    """The checks of the disk on which run folders are to lie in `folder`, and of that for temporary files."""
    return (
        lambda answers: check_disk("run folders", folder),
        lambda answers: check_disk("temporary files", Path(tempfile.gettempdir())),
        lambda answers: check_lock(folder),
        lambda answers: check_clock(folder),
    )


def check_disk(name: str, folder: Path) -> Iterator[Finding]:
    """Space on the disk of `folder`, its file system, and how fast it takes 32 MiB."""
    try:
        usage = shutil.disk_usage(folder)
        speed = _write_speed(folder)
    except OSError as e:
        yield problem(name, f"{folder} cannot be written: {e.strerror}", "Name a folder that you may write to.")
        return
    kind = file_system(folder)
    place = "over the network" if kind in _NETWORK or kind.startswith("fuse") else "on this machine"
    place = "in memory" if kind in _IN_MEMORY else place
    found = f"{folder}: {usage.free / GIB:.0f} GiB free, {kind} {place}, writes {speed / 1e6:.0f} MB/s"
    if usage.free < 5 * GIB:
        yield warning(name, found, "Make room: checkpoints take gigabytes; `msdiff plan` shows how many.")
    elif speed < 20e6:
        yield warning(name, found, "Checkpoints will take long: choose a faster disk, or raise checkpoint.every.")
    else:
        yield ok(name, found)


def file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`, as Linux names it; "unknown" where it is not listed."""
    here = str(folder.resolve()) + "/"
    mounts = [line.split()[1:3] for line in (text_of("/proc/self/mounts") or "").splitlines()]
    # A blank in the name of a folder is written as \040.
    named = [(point.encode().decode("unicode_escape").rstrip("/") + "/", kind) for point, kind in mounts]
    # Of those mounted on the same point the last one counts.
    holding = [(len(point), i, kind) for i, (point, kind) in enumerate(named) if here.startswith(point)]
    return max(holding, default=(0, 0, "unknown"))[2]


def _write_speed(folder: Path) -> float:
    """Bytes a second that reach the disk."""
    with tempfile.TemporaryFile(dir=folder) as file:
        content = os.urandom(_SAMPLE)  # some file systems compress
        start = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return _SAMPLE / (time.perf_counter() - start)


def check_lock(folder: Path) -> Iterator[Finding]:
    """Whether a lock on a file keeps a second process out, as that of a run folder has to."""
    second = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    name, cure = "file locks", "Mount the file system with locks (Lustre: -o flock), or put run folders elsewhere."
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entered = subprocess.run([sys.executable, "-c", second, file.name], capture_output=True).returncode == 0
    except OSError as e:
        yield problem(name, f"{folder}: {e.strerror}", cure)
        return
    if entered:
        yield problem(name, f"{folder}: a second process gets a lock that is held", cure)
    else:
        yield ok(name, "a lock keeps a second process out")


def check_clock(folder: Path) -> Iterator[Finding]:
    """The clock of this machine beside that of the disk's server, and beside the year of this Python."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            before = time.time()
            os.utime(file.name)
            ahead = os.stat(file.name).st_mtime - before
    except OSError:  # said by the check of the disk
        return
    shown = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    if abs(ahead) > 5:
        cure = "Have both set by a time server (chrony)."
        yield warning("clock", f"{shown}; that of the disk's server differs by {ahead:+.0f} s", cure)
    elif time.time() < os.stat(os.__file__).st_ctime:
        yield warning("clock", f"{shown}, before this Python was installed", "Set the clock.")
    else:
        yield ok("clock", shown)
