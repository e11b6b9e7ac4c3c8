"""The built package by itself: what is in the wheel, and the installed command without the sources."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "msdiff_dist", "recipes", "slurm")
HELP_OF_EVERY_VERB = """
import re, typer.main
from typer.testing import CliRunner
from msdiff_dist.cli.main import app
from msdiff_dist.shipped import shipped_files

files = {f.path.name for f in shipped_files()}
def verbs(command, words=()):
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from verbs(inner, (*words, name))
for words in verbs(typer.main.get_command(app)):
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--help"])
    assert done.exit_code == 0, (words, done.output)
    assert not re.search(r"recipes/|slurm/|tools/|docs/", done.output), (words, done.output)
    example = re.sub(r"--out \\S+", "", done.output.partition("Example:")[2].partition("╭")[0])
    for named in re.findall(r"\\w+\\.yaml", example):
        assert named in files, (words, named)
    print(*words)
"""

pytestmark = pytest.mark.integration


def built(folder: Path) -> Path:
    """Build a wheel from a copy of the sources, because a build leaves files among them."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("wheel"))


Msdiff = Callable[..., str]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, which finds the packages of this one but not this one's msdiff_dist."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True, capture_output=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # A .pth file adds the folder alone: .pth files inside it, such as that of an editable install, are not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture
def msdiff(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Msdiff:
    """Run a command of the environment in an empty folder; returns what it printed."""
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def run(*words: object, program: str = "msdiff", status: int = 0) -> str:
        command = [str(environment / "bin" / program), *map(str, words)]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_same_sources_same_bytes(wheel: Path, tmp_path: Path) -> None:
    again = built(tmp_path)
    assert again.name == wheel.name
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(wheel.read_bytes()).digest()


def test_it_holds_the_package_and_the_shipped_files(wheel: Path) -> None:
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "msdiff_dist").rglob("*.py")} | {"msdiff_dist/py.typed"}
    package |= {str(p.relative_to(ROOT)) for p in (ROOT / "msdiff_dist/apps/report/templates").iterdir()}
    shipped = {f"msdiff_dist/{p.relative_to(ROOT)}" for f in ("recipes", "slurm") for p in (ROOT / f).rglob("*.*")}
    assert inside == package | shipped


def test_help_recipes_and_plans(msdiff: Msdiff, tmp_path: Path) -> None:
    assert str(ROOT) not in msdiff("-c", "import msdiff_dist; print(msdiff_dist.__file__)", program="python")
    verbs = msdiff("-c", HELP_OF_EVERY_VERB, program="python").splitlines()
    assert {"train", "init", "data prepare", "classifier train"} <= set(verbs)
    names = [f["name"] for f in json.loads(msdiff("recipes", "--json"))]
    assert {"quickstart", "ablations/cifar10_full", "slurm/gpu"} <= set(names)
    missing = msdiff("plan", "quickstart", "--world-size", 4, status=2)
    assert "`msdiff init quickstart` writes it" in missing
    assert msdiff("init", "quickstart").split() == ["quickstart.yaml"]
    plan = json.loads(msdiff("plan", "quickstart.yaml", "--world-size", 4, "--no-data", "--json"))
    assert plan["world_size"] == 4


@pytest.mark.slow
def test_from_data_to_export(msdiff: Msdiff, tmp_path: Path) -> None:
    assert msdiff("--version").strip()
    msdiff("init", "quickstart")
    msdiff("data", "prepare", "digits", "--out", "data/digits")
    changes = ["train.steps=2", "checkpoint.every=2", "preview.every=0"]
    assert "step 2/2" in msdiff("train", "quickstart.yaml", *changes, "--nproc", 2)
    msdiff("sample", "runs/quickstart", "--num", 4, "--steps", 2, "--out", "images")
    assert len(list((tmp_path / "images").glob("0*.png"))) == 4
    msdiff("export", "runs/quickstart", "--out", "exported")
    msdiff("init", "--from", "exported", "--out", "further.yaml")
    change = "data.shards=data/digits"
    assert json.loads(msdiff("plan", "further.yaml", change, "--world-size", 2, "--json"))["world_size"] == 2
    assert "from exported" in msdiff("train", "further.yaml", change, *changes)
