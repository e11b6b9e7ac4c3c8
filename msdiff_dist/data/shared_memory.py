"""Room in /dev/shm, through which loader workers hand over samples."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from msdiff_dist.errors import ConfigError

_FOLDER = Path("/dev/shm")
_IN_FLIGHT = 3  # batches: two that each worker reads ahead, and the one being used


def check_shared_memory(workers: int, batch_bytes: int, folder: Path = _FOLDER) -> None:
    """Check that the batches of this rank's workers have room beside those of the other ranks of its node.

    A worker that finds none is killed by a bus error, which says nothing of the cause.

    Args:
        batch_bytes: of what one rank reads of a global batch.

    Raises:
        ConfigError: there is too little room.
    """
    if not folder.is_dir():  # systems other than Linux keep shared memory elsewhere
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, free = _IN_FLIGHT * batch_bytes * ranks, shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            "data.workers", workers,
            f"the batches that workers read ahead on {ranks} ranks take {needed / 1e6:.0f} MB of shared memory, and "
            f"{folder} has {free / 1e6:.0f} MB free",
            "Give the container more (docker --shm-size 16g, or --ipc host), or set data.workers to 0.",
        )  # fmt: skip
