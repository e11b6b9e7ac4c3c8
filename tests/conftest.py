"""Settings of all tests, and how pytest-xdist deals them to its workers."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

settings.register_profile("project", deadline=None)  # machines differ and are shared: no test asserts a time
settings.load_profile("project")

# `msdiff train` and `msdiff launch` remember run folders below it: not in the home folder of whoever runs the tests.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="msdiff-state-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

SLURM = "tests/slurm/"
# Folders whose files take minutes, and of which the first mostly waits: they come first, lest one worker end long
# after the other.
_LONG = (SLURM, "tests/distributed/", "tests/integration/", "tests/golden/")


class ByFile(LoadScopeScheduling):
    """Keeps the tests of a file, which share fixtures, on one worker, and all that share the SLURM cluster."""

    def _split_scope(self, nodeid: str) -> str:
        return SLURM if nodeid.startswith(SLURM) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    config.option.loadscopereorder = False  # in the order of collection, not of the number of tests
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in _LONG])
