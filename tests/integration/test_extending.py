"""The package of docs/extending.md, put on the path, adds one of each kind without a change to this package."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.integration
PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
FILE = re.compile(r"^```\w+\n# ([\w/.]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ msdiff (.+)$", re.MULTILINE)
LOAD = """
import torch
from msdiff_dist.export.timed_model import load_model
model = load_model("exported")
x = torch.zeros(2, 1, 16, 16)
print(model(x, torch.tensor([0.1, 0.9])).shape, type(model.network.shared).__name__)
"""
REFUSED = """
from msdiff_dist.errors import ConfigError
from msdiff_dist.recipe import load_recipe
for wrong in ("model.family=plian", "diffusion.process=flwo", "optimizer.name=rmsporp", "metrics.sinks=[cvs]"):
    try:
        load_recipe("recipe.yaml", [wrong])
    except ConfigError as e:
        print(e.field, e.remedy.removeprefix("Did you mean ").removesuffix("?"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, and in `installed` what `pip install` would leave of their entry points."""
    folder = tmp_path_factory.mktemp("extending")
    for name, content in FILE.findall(PAGE.read_text()):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    about = folder / "installed" / f"my_parts-{project['version']}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [line for group, points in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def python(folder: Path, *args: str, path: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder`, with these of its folders on the path, and like an installed command without `folder`."""
    known = [str(folder / name) for name in path] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    env: Mapping[str, str] = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [*known, str(PAGE.parents[1])]))}
    return subprocess.run([sys.executable, "-P", *args], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def ended(folder: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """The page's commands, by verb, in their order; only those without a recipe see the entry points."""
    done = {}
    for command in COMMAND.findall(PAGE.read_text()):
        words = command.split()
        needs_installed = words[0] in ("data", "convert")
        done[command] = python(
            folder, "-m", "msdiff_dist.cli.main", *words, path=(".", "installed") if needs_installed else (".",)
        )
        assert done[command].returncode == 0, f"msdiff {command}\n{done[command].stdout}{done[command].stderr}"
    return done


@pytest.mark.usefixtures("ended")
def test_the_family_and_process_train_and_the_solver_samples(folder: Path) -> None:
    rows = list(csv.reader((folder / "run/losses.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert len(list((folder / "samples").glob("0*.png"))) == 4


@pytest.mark.usefixtures("ended")
def test_the_format_goes_there_and_back_bit_by_bit(folder: Path) -> None:
    before, after = load_file(folder / "exported/model.safetensors"), load_file(folder / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


@pytest.mark.usefixtures("ended")
def test_an_export_brings_its_extensions(folder: Path) -> None:
    loaded = python(folder, "-c", LOAD, path=(".",))
    assert loaded.stdout.split("\n")[0] == "torch.Size([2, 1, 16, 16]) PlainEncoder", loaded.stderr
    missing = python(folder, "-m", "msdiff_dist.cli.main", "sample", "exported", "--out", "none", path=())
    assert missing.returncode == 2
    words = " ".join(missing.stderr.split())
    assert "extensions = 'my_parts': cannot be imported (No module named 'my_parts')" in words
    assert "PYTHONPATH" in words


def test_names_of_nobody_are_refused_with_those_of_the_package(folder: Path) -> None:
    refused = python(folder, "-c", REFUSED, path=(".",))
    fields = ["model.family 'plain'", "diffusion.process 'flow'", "optimizer.name 'rmsprop'", "metrics.sinks[0] 'csv'"]
    assert refused.stdout.splitlines() == fields, refused.stderr
