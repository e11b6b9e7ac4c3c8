"""Records of runs and answers of SLURM's commands: read back by later versions, after crashes, from any cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msdiff_dist.data.make.encoding import ShardRecord
from msdiff_dist.data.make.manifest import ManifestFile
from msdiff_dist.errors import UserError
from msdiff_dist.files.folder_claim import FolderClaim
from msdiff_dist.files.json_text import parse_json
from msdiff_dist.files.work_share import Part
from msdiff_dist.launch.plain_run import last_metrics, total_steps
from msdiff_dist.launch.record import JobRecord
from msdiff_dist.launch.restarts import Diary
from msdiff_dist.launch.slurm import parse_accounting, parse_nodes, parse_queue
from msdiff_dist.training.run_folder import RunFolder

from ..mutations import mutate_json, mutate_lines
from ..target import DisagreementError, Target
from .data import json_hostile

_SETTINGS = {"recipe": "x.yaml", "steps": 50, "shape": [3, 8, 8], "nested": {"seed": 0}}


def _metrics() -> bytes:
    lines = [
        {"step": i, "loss": 1.0 / i, "images_per_second": 12.5, "time": 1.7e9 + i, "lr": 1e-4} for i in range(1, 9)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _hostile_lines(valid: bytes) -> dict[str, bytes]:
    found = json_hostile(valid.split(b"\n")[0])
    found |= {f"then {name}": valid + data + b"\n" for name, data in found.items()}
    return {**found, "torn": valid[:-5], "torn, then whole": valid[:-5] + b"\n" + valid, "no lines": b"\n\n\n"}


def _read_metrics(data: bytes, folder: Path) -> Any:
    run = RunFolder(folder)
    run.metrics_file.write_bytes(data)
    lines = last_metrics(folder)
    for line in lines:
        line.get("step"), line.get("loss")
    run.cut_metrics(3)
    kept = [parse_json(line)["step"] for line in run.metrics_file.read_bytes().splitlines()]
    if any(step > 3 for step in kept):
        raise AssertionError(f"kept {kept}")
    return kept


def _written(name: str, read: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    def call(data: bytes, folder: Path) -> Any:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        return read(folder)

    return call


def _read_claim(data: bytes, folder: Path) -> Any:
    target = folder / "claimed"
    target.mkdir(exist_ok=True)
    (target / "settings.json").write_bytes(data)
    claim = FolderClaim(
        folder=target, record=target / "settings.json", locks=target / ".locks", content="images", error=UserError
    )
    with claim.held(_SETTINGS, Part(0, 1)):
        return True


def _claim_is_equal(data: bytes, found: Any) -> None:
    if json.loads(data) != _SETTINGS:
        raise DisagreementError(f"settings: {data!r:.300} are taken for {_SETTINGS}")


def _shard_record() -> bytes:
    file = ManifestFile(name="0.tar", samples=3, bytes=5, sha256="0" * 64)
    record = ShardRecord(file=file, mark="x", shape=(4, 8, 8), count=3, sum=1.5, squares=2.5)
    return json.dumps(asdict(record)).encode()


def _text(parse: Callable[[str], Any]) -> Callable[[bytes, Path], Any]:
    return lambda data, folder: parse(data.decode("utf-8", "replace"))


_QUEUE = b"""12      |PENDING             |2      |0     |Resources
13_1    |RUNNING             |1      |3     |None
13_2    |COMPLETED           |1      |0     |None
"""
_STARTS = b"""{"key": "1.0", "time": 1.5, "job": "1", "ranks": 2, "step": 0}
{"key": "1.0", "time": 2.5, "outcome": "preempted"}
{"key": "1.1", "time": 3.5, "job": "1", "ranks": 2, "step": 10}
"""
_JOB = json.dumps(
    {"run": "/r", "job_ids": ["12"], "executor": "slurm", "logs": "/r/launch", "submitted": 1.5, "parts": None}
).encode()
_NUMBERS = {
    "long number": b"1" * 5000,
    "empty": b"",
    "bars": b"|" * 5000,
    "an error": b"slurm_load_jobs error: Invalid job id\n",
}
TARGETS = (
    Target(
        name="metrics",
        read=_read_metrics,
        seeds=lambda: [_metrics()],
        hostile=lambda: _hostile_lines(_metrics()),
        mutate=mutate_lines,
    ),
    Target(
        name="starts",
        read=_written(
            "starts.jsonl", lambda folder: Diary(folder / "starts.jsonl", "1").starts_without_progress(10, 1)
        ),
        seeds=lambda: [_STARTS],
        hostile=lambda: _hostile_lines(_STARTS),
        mutate=mutate_lines,
    ),
    Target(
        name="job",
        read=_written("launch/job.json", JobRecord.load),
        seeds=lambda: [_JOB],
        hostile=lambda: json_hostile(_JOB),
        mutate=mutate_json,
    ),
    Target(
        name="stored-recipe",
        read=_written("recipe.yaml", lambda folder: (total_steps(folder), RunFolder(folder).stored_recipe())),
        seeds=lambda: [b"name: x\ntrain:\n  steps: 5\n"],
        mutate=mutate_lines,
        largest=1 << 11,
        hostile=lambda: {
            "no steps": b"train: {}",
            "list": b"[]",
            "empty": b"",
            "text": b"a",
            "train is text": b"train: x",
        },
    ),
    Target(
        name="claim",
        read=_read_claim,
        seeds=lambda: [json.dumps(_SETTINGS).encode()],
        mutate=mutate_json,
        oracle=_claim_is_equal,
        hostile=lambda: json_hostile(json.dumps(_SETTINGS).encode()),
    ),
    Target(
        name="shard-record",
        read=_written("0.json", lambda folder: ShardRecord.load(folder / "0.json")),
        seeds=lambda: [_shard_record()],
        hostile=lambda: json_hostile(_shard_record()),
        mutate=mutate_json,
    ),
    Target(
        name="squeue", read=_text(parse_queue), seeds=lambda: [_QUEUE], hostile=lambda: _NUMBERS, mutate=mutate_lines
    ),
    Target(
        name="sacct",
        read=_text(parse_accounting),
        seeds=lambda: [b"12|COMPLETED|2\n13_1|CANCELLED by 1000|1\n"],
        hostile=lambda: _NUMBERS,
        mutate=mutate_lines,
    ),
    Target(
        name="sinfo",
        read=_text(parse_nodes),
        seeds=lambda: [b"n1|gpu:a100:4(S:0-1)|64|512000+\nn2|(null)|8+|1000\n"],
        hostile=lambda: _NUMBERS,
        mutate=mutate_lines,
    ),
)
