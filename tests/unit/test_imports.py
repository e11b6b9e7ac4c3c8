"""Any module may be the first of the package that a process imports: commands import only what they need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# One process imports the libraries; each module is then imported in a fork of it, where no other of ours is loaded yet.
SCRIPT = """
import importlib, os, sys, traceback
for library in sys.argv[1].split(","):
    importlib.import_module(library)
for module in sys.argv[2:]:
    if os.fork() == 0:
        try:
            importlib.import_module(module)
        except BaseException:
            print(module, traceback.format_exc().splitlines()[-1], flush=True)
        os._exit(0)
    os.wait()
"""
LIBRARIES = (
    "torch", "deepspeed", "torchvision", "diffusers", "transformers", "webdataset", "submitit", "typer", "rich.progress"
)  # fmt: skip


@pytest.mark.slow
def test_every_module_can_be_imported_first() -> None:
    paths = sorted((ROOT / "msdiff_dist").rglob("*.py"))
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths]
    command = [sys.executable, "-c", SCRIPT, ",".join(LIBRARIES), *names]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    problems = [line for line in ended.stdout.splitlines() if line.startswith("msdiff_dist.")]
    assert problems == []
    assert len(names) > 200
