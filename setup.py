"""Building the package: recipes and cluster files come along, and the same code gives the same wheel.

Everything else is in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("recipes", "slurm")

# Times inside the wheel: the first that a zip file can hold, unless the packager names another.
os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")


class BuildWithShippedFiles(build_py):
    """Puts recipes and cluster files into the package, where `msdiff_dist.shipped` looks for them first."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # files of an earlier build would come along
        super().run()
        if self.editable_mode:  # found in the checkout
            return
        package = Path(self.build_lib) / "msdiff_dist"
        for folder in SHIPPED:
            shutil.copytree(folder, package / folder)
        for path in package.rglob("*"):  # whatever the umask of the checkout was
            path.chmod(0o755 if path.is_dir() else 0o644)


setup(cmdclass={"build_py": BuildWithShippedFiles})
