#!/usr/bin/env python
"""Fuzz the parsers of foreign bytes, guided by coverage, from a corpus that grows.

    python tools/fuzz.py                                   the targets
    python tools/fuzz.py tar npy --minutes 10 --corpus DIR  fuzz these, or with `all` every target
    python tools/fuzz.py tar --input FILE                   examine one input

A target is a parser, what it may raise, and the library whose reading of the same bytes must agree (see
`fuzzing/target.py`). Besides unexpected exceptions and disagreements, a fault is an input that takes more than 2 s of
CPU time or 256 MiB of memory. Every kind of fault is written once, minimised, with the command that reproduces it, to
DIR/TARGET/faults; DIR/TARGET/inputs is the corpus, from which the next start resumes.

Needs atheris (`pip install 'msdiff-dist[fuzz]'`). Exit status: 0 without faults, 1 with, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the package must be imported after atheris, which instruments it
    from fuzzing.target import Fault, Target

CORPUS = Path("~/.cache/msdiff-fuzz")
_EXTRA_ADDRESSES = 4 << 30  # bytes that a child may map besides what its imports map: a larger claim is a MemoryError
_MINIMISING_S = 10.0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--minutes", type=float, default=1.0, help="of each target (default: 1)")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help=f"folder that is kept (default: {CORPUS})")
    parser.add_argument("--input", type=Path, help="examine this file with the one TARGET")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _fuzz(args.targets[0], args.corpus, 60 * args.minutes)
    from fuzzing.targets import TARGETS

    names = list(TARGETS) if args.targets == ["all"] else args.targets
    unknown = [name for name in names if name not in TARGETS]
    if not names or unknown or (args.input and len(names) != 1):
        print(f"no such target: {unknown[0]}" if unknown else "name a target, or all", file=sys.stderr)
        print(*TARGETS, sep="\n")
        return 2 if unknown or args.input else 0
    if args.input:
        return _examine_one(TARGETS[names[0]], args.input)
    faults = sum(_run(name, args.corpus.expanduser() / name, 60 * args.minutes) for name in names)
    return 1 if faults else 0


def _examine_one(target: Target, path: Path) -> int:
    from fuzzing.target import examine

    with _scratch() as folder:
        fault = examine(target, path.read_bytes(), Path(folder))
    print("no fault" if fault is None else f"{fault.kind}\n{fault.details}")
    return 0 if fault is None else 1


def _run(name: str, folder: Path, seconds: float) -> int:
    """Fuzz one target in processes of its own; returns the number of kinds of fault in its folder."""
    end, inputs = time.monotonic() + seconds, 0
    while (left := end - time.monotonic()) > 1:
        command = [sys.executable, __file__, name, "--child", "--corpus", str(folder), "--minutes", str(left / 60)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        count = folder / "count"
        inputs += int(count.read_text()) if count.exists() else 0
        count.unlink(missing_ok=True)
        # libFuzzer ends a process that hangs or grows too large in code that Python cannot interrupt, and keeps the
        # input as timeout-*, oom-* or crash-*. Another one takes over.
        if done.returncode and not any(folder.glob("faults/*-*")):
            print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
            raise SystemExit(f"fuzzing {name} ended with status {done.returncode}")
        if done.returncode:
            (folder / "faults/last_death.log").write_text(done.stderr[-20000:])
    faults = sorted(path for path in (folder / "faults").iterdir() if path.suffix not in (".txt", ".log"))
    print(f"{name}: {inputs} inputs, {len(faults)} kinds of fault", flush=True)
    for path in faults:
        print(f"  python tools/fuzz.py {name} --input {path}", flush=True)
    return len(faults)


def _fuzz(name: str, folder: Path, seconds: float) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["msdiff_dist", "PIL"]):
        from fuzzing.targets import TARGETS
    from fuzzing.mutations import mutate_bytes
    from fuzzing.target import examine, memory_of

    target = TARGETS[name]
    inputs, faults, seeds = (folder / part for part in ("inputs", "faults", "seeds"))
    for path in (inputs, faults, seeds):
        path.mkdir(parents=True, exist_ok=True)
    hostile = target.hostile()
    for data in (*target.seeds(), *(data for data in hostile.values() if len(data) <= target.largest)):
        (seeds / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    scratch = Path(tempfile.mkdtemp(dir=_scratch_parent()))
    count, written = 0, time.monotonic()

    def one_input(data: bytes) -> None:
        nonlocal count, written
        fault = examine(target, data, scratch)
        count += 1
        if time.monotonic() > written + 1:
            written = time.monotonic()
            (folder / "count").write_text(str(count))
        if fault is not None:
            _keep(target, data, fault, faults, scratch)

    def mutated(data: bytes, largest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.25:
            return bytes(atheris.Mutate(data, largest))
        if target.mutate is None or rng.random() < 0.2:
            return mutate_bytes(rng, data, target.words)[:largest]
        return target.mutate(rng, data)[:largest]

    for data in hostile.values():
        one_input(data)
    resource.setrlimit(resource.RLIMIT_AS, (memory_of("VmSize") + _EXTRA_ADDRESSES, resource.RLIM_INFINITY))
    options = [f"-max_total_time={max(1, round(seconds))}", f"-max_len={target.largest}", "-timeout=30"]
    options += ["-rss_limit_mb=4096", f"-artifact_prefix={faults}/", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(inputs), str(seeds)], one_input, custom_mutator=mutated)
    atheris.Fuzz()


def _keep(target: Target, data: bytes, fault: Fault, faults: Path, scratch: Path) -> None:
    """Write the first input of a kind of fault, made smaller."""
    slug = re.sub(r"[^\w.:]+", "_", fault.kind)[:100].replace("/", "_")
    if list(faults.glob(f"{slug}-*")):
        return
    data = _minimised(target, data, fault, scratch)
    path = faults / f"{slug}-{hashlib.sha256(data).hexdigest()[:8]}"
    path.write_bytes(data)
    about = {"target": target.name, "kind": fault.kind, "bytes": len(data)}
    path.with_name(path.name + ".txt").write_text(
        f"python tools/fuzz.py {target.name} --input {path}\n{json.dumps(about)}\n{fault.details}\n"
    )


def _minimised(target: Target, data: bytes, fault: Fault, scratch: Path) -> bytes:
    """The input without the pieces that the fault does not need."""
    from fuzzing.target import examine

    end, size = time.monotonic() + _MINIMISING_S, len(data) // 2
    while size and time.monotonic() < end:
        at = 0
        while at < len(data) and time.monotonic() < end:
            shorter = data[:at] + data[at + size :]
            found = examine(target, shorter, scratch)
            if found is not None and found.kind == fault.kind:
                data = shorter
            else:
                at += size
        size //= 2
    return data


def _scratch_parent() -> str | None:
    memory = Path("/dev/shm")  # each input may be written to a file first
    return str(memory) if memory.is_dir() else None


def _scratch() -> Any:
    return tempfile.TemporaryDirectory(dir=_scratch_parent())


if __name__ == "__main__":
    sys.exit(main())
