"""What NCCL needs to be set before its first group, and the record of the last collectives when a job ends.

The variables are those of torch 2.10 to 2.14 (ProcessGroupNCCL.hpp, FlightRecorder.hpp); newer names have older ones as
aliases. Values of the user's environment win.
"""

from __future__ import annotations

import importlib
import os
import threading
from pathlib import Path

import torch

_WRITING_S = 5.0  # after this the process ends without the record: in a broken state it may not come

_SETTINGS = (
    # Collectives of each rank that are remembered. Each is a line of some hundred bytes.
    (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"),
    # The watchdog writes them when a collective is over its time limit.
    (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
    # Several communicators are in use at once: kernels are launched in the order in which the host issued them, which
    # is the same on every rank, so no two ranks each wait in another communicator for the other one.
    (("NCCL_LAUNCH_ORDER_IMPLICIT",), "1"),
)
_FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def set_nccl_defaults(logs: Path) -> None:
    """Set the variables above where the environment does not; each rank R of a failed job leaves `logs/collectives_R`.

    To be called before the first process group is made.
    """
    for names, value in (*_SETTINGS, (_FILE, str(logs.resolve() / "collectives_"))):
        # The older name is set as well, for versions of torch that do not know the newer one.
        if not any(name in os.environ for name in names):
            os.environ.update(dict.fromkeys(names, value))


def write_record(rank: int) -> None:
    """Write the last collectives of this rank where the watchdog would, for torch's `torchfrtrace` to read.

    The watchdog itself comes too late where a lost rank ends the job before a collective is over its time limit.
    """
    prefix = next((os.environ[name] for name in _FILE if name in os.environ), None)
    if prefix is None or not torch.cuda.is_available():
        return

    def write() -> None:
        dump = importlib.import_module("torch._C._distributed_c10d")._dump_nccl_trace  # without a stub
        Path(f"{prefix}{rank}").write_bytes(dump())

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(_WRITING_S)
