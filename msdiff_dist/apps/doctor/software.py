"""Python, packages and compilers: whether they are there, can be imported, and belong together."""

from __future__ import annotations

import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement

from msdiff_dist.apps.doctor.finding import Finding, listed, ok, problem, warning
from msdiff_dist.apps.doctor.probe import MODULES, Answers

PACKAGE = "msdiff-dist"
PYTHONS = ((3, 11), (3, 12))
SHOWN = (
    "torch", "torchvision", "triton", "deepspeed", "xformers", "fairscale", "diffusers", "open_clip_torch",
    "transformers", "webdataset", "submitit", "numpy",
)  # fmt: skip
_INSTALL = "Install the versions of constraints.txt: `pip install -c constraints.txt msdiff-dist`."


def versions() -> dict[str, str | None]:
    """Versions of Python, this package and the libraries that matter most; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (PACKAGE, *SHOWN):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def check_python(answers: Answers) -> Iterator[Finding]:
    """The version of Python, and that of this package."""
    here = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] in PYTHONS:
        yield ok("Python", here)
    else:
        tested = listed([f"{major}.{minor}" for major, minor in PYTHONS])
        yield warning("Python", here, f"Use one of the versions that are tested: {tested}.")


def check_packages(answers: Answers) -> Iterator[Finding]:
    """Whether every installed package has the versions of others that it says it needs."""
    try:
        faults = sorted(set(_unmet(PACKAGE, set())))
    except PackageNotFoundError:
        yield warning("packages", f"{PACKAGE} runs from its sources", "Install it: `pip install -e .`.")
        return
    found = versions()
    if faults:
        yield problem("packages", "; ".join(faults), _INSTALL)
    else:
        names = ("torch", "torchvision", "deepspeed", "xformers", "diffusers")
        yield ok("packages", "the versions fit together: " + ", ".join(f"{n} {found[n]}" for n in names))


def _unmet(package: str, seen: set[str]) -> Iterator[str]:
    """What is missing or of another version than needed, by `package` and by all that it needs."""
    seen.add(package)
    for text in distribution(package).requires or []:
        needed = Requirement(text)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = distribution(needed.name)
        except PackageNotFoundError:
            yield f"{package} needs {needed.name}, which is not installed"
            continue
        if not needed.specifier.contains(installed.version, prereleases=True):
            yield f"{package} needs {needed.name}{needed.specifier}, installed is {installed.version}"
        if needed.name not in seen:
            yield from _unmet(needed.name, seen)


def check_imports(answers: Answers) -> Iterator[Finding]:
    """Whether the libraries can be imported."""
    errors = {module: answers.errors.get(f"import {module}") for module in ("xformers.ops", *MODULES)}
    broken = {module: error for module, error in errors.items() if error}
    for module, error in broken.items():
        name = module.partition(".")[0]
        cure = f"Install {name} again, in the version of constraints.txt; look for a folder `{name}` on PYTHONPATH."
        yield problem(f"import {name}", error, cure)
    if not broken:
        yield ok("imports", f"{len(MODULES) + 1} libraries can be imported")


def check_xformers(answers: Answers) -> Iterator[Finding]:
    """Whether xformers' extension loads, without which a recipe cannot ask for xformers."""
    if "import xformers.ops" in answers.errors:  # said above
        return
    reason = answers.known.get("xformers") or answers.errors.get("xformers")
    if reason is None:
        yield ok("xformers", f"{versions()['xformers']}, its CUDA extension loads")
    else:
        cure = f"Recipes with `attention_backend: xformers` are refused; the others train. {_INSTALL}"
        yield warning("xformers", reason, cure)


def check_compilers(answers: Answers) -> Iterator[Finding]:
    """What torch.compile and triton need to make kernels: a C++ compiler and Python's headers."""
    compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [] if compiler else ["a C++ compiler (g++)"]
    missing += [] if headers.is_file() else [f"Python's headers ({headers})"]
    if missing:
        cure = "Needed by torch.compile only. Install g++ and python3-dev, or load the cluster's compiler module."
        yield warning("compilers", f"not found: {listed(missing)}", cure)
    else:
        yield ok("compilers", f"{compiler}, {headers}")
