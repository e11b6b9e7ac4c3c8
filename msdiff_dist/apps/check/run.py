"""The groups of a check, in the order in which they run, and what they find, as a table and as plain data."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from msdiff_dist.apps.check.families import families
from msdiff_dist.apps.check.findings import Bench, Finding
from msdiff_dist.apps.check.operators import operators
from msdiff_dist.apps.check.runs import failure, layouts, resuming
from msdiff_dist.apps.check.throughput import throughput
from msdiff_dist.apps.verdict import Status, worst
from msdiff_dist.distributed.cpuinfo import cpuinfo
from msdiff_dist.errors import ConfigError, UserError, did_you_mean

GROUPS: dict[str, Callable[[Bench], Iterator[Finding]]] = {
    "operators": operators,
    "families": families,
    "resuming": resuming,
    "layouts": layouts,
    "failure": failure,
    "throughput": throughput,
}


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """A finished check.

    Attributes:
        device: its name, and whether it is a `cuda` device or the `cpu`.
        seconds: duration of each group.
    """

    device: dict[str, str]
    small: bool
    seconds: dict[str, float]
    findings: list[Finding]

    @property
    def status(self) -> Status:
        """The gravest of the findings'."""
        return worst(f.status for f in self.findings)

    def fields(self) -> dict[str, Any]:
        """The report as plain data, as `msdiff check --json` writes it."""
        return {"status": self.status, **asdict(self)}


def run_check(device: torch.device, small: bool, only: Sequence[str], show: Callable[[Finding], None]) -> CheckReport:
    """Run the groups on a device.

    A group that raises is a problem and does not stop the others.

    Args:
        small: take sizes that a CPU computes in a minute.
        only: groups to run; empty: all.
        show: called with each finding as soon as it is known.

    Raises:
        ConfigError: the device is absent, or a group is unknown.
    """
    _check_device(device)
    for name in only:
        if name not in GROUPS:
            raise ConfigError("--only", name, "is not a group of the check", did_you_mean(name, GROUPS))
    seconds, findings = {}, []
    for name in only or GROUPS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="msdiff-check-") as folder:
            for finding in _guarded(name, Bench(device=device, small=small, folder=Path(folder))):
                findings.append(finding)
                show(finding)
        seconds[name] = time.monotonic() - start
    return CheckReport(device=_describe(device), small=small, seconds=seconds, findings=findings)


def _guarded(name: str, bench: Bench) -> Iterator[Finding]:
    """The group's findings; if it raises, a last one that says so."""
    try:
        yield from GROUPS[name](bench)
    except UserError:
        raise
    except Exception as e:
        found = f"{type(e).__name__}: {e}"
        text = "".join(traceback.format_exception(e))
        yield Finding(group=name, name="ends", status="problem", found=found, figures={"traceback": text})


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        raise ConfigError(
            "--device", "cuda", f"torch {torch.__version__}, built for CUDA {built}, sees no GPU",
            "`msdiff doctor` says why. Or check the CPU with --device cpu.",
        )  # fmt: skip


def _describe(device: torch.device) -> dict[str, str]:
    if device.type == "cuda":
        return {"kind": "cuda", "name": torch.cuda.get_device_name(device)}
    names = [line.split(":", 1)[1].strip() for line in cpuinfo().splitlines() if line.startswith("model name")]
    return {"kind": "cpu", "name": names[0] if names else "unknown"}
