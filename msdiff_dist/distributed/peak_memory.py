"""The most memory that this process has held so far."""

from __future__ import annotations

import resource

import torch


def peak_bytes(device: torch.device) -> int:
    """Most bytes of tensors on a GPU at one time, as torch's allocator counts them; on a CPU of the whole process.

    Neither asks the device, so the host does not wait for it.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
