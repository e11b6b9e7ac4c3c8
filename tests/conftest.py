"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("project", deadline=None)  # machines differ and are shared: no test asserts a time
settings.load_profile("project")
