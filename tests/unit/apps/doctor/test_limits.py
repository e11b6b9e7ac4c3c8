"""Limits read from control groups of both kinds, and file systems from the list of mounts."""

from __future__ import annotations

from pathlib import Path

from msdiff_dist.apps.doctor.limits import memory_limit
from msdiff_dist.apps.doctor.storage import file_system


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_the_least_limit_of_the_groups_around_a_process_holds(tmp_path: Path) -> None:
    own = "0::/slurm/job_7/step_0"
    assert memory_limit(tmp_path, own) is None
    write(tmp_path / "slurm/memory.max", "max")
    write(tmp_path / "slurm/job_7/memory.max", "8000")
    write(tmp_path / "slurm/job_7/step_0/memory.max", "max")
    assert memory_limit(tmp_path, own) == 8000
    write(tmp_path / "memory.max", "500")
    assert memory_limit(tmp_path, own) == 500


def test_the_older_kind_of_control_groups(tmp_path: Path) -> None:
    own = "5:cpu,cpuacct:/elsewhere\n4:memory:/docker/1f"
    write(tmp_path / "memory/memory.limit_in_bytes", "9000")  # of the container, which does not see its host's groups
    write(tmp_path / "elsewhere/memory.max", "1")
    assert memory_limit(tmp_path, own) == 9000


def test_file_systems() -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/sys/kernel")) == "sysfs"
