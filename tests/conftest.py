"""Settings of all tests."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("project", deadline=None)  # machines differ and are shared: no test asserts a time
settings.load_profile("project")

# Folders whose files take minutes and of which the first mostly waits; all others follow.
_LONG = ("tests/slurm/", "tests/distributed/", "tests/integration/")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal the tests to pytest-xdist's workers by file, the longest first.

    The tests of a file share its fixtures; those of the SLURM cluster share one cluster.
    """

    def folder_of(item: pytest.Item) -> int:
        return next((i for i, folder in enumerate(_LONG) if item.nodeid.startswith(folder)), len(_LONG))

    items.sort(key=folder_of)
    for item in items:
        file = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group("slurm" if folder_of(item) == 0 else file))
