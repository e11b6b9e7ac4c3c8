"""Which warnings and log lines are shown: ours, and those of errors, but not what other libraries tell programmers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WARN = """
import warnings
def warn(module, text, category):
    warnings.warn_explicit(text, category, module.replace(".", "/") + ".py", 1, module=module)
for module in ("msdiff_dist.export.posthoc", "my_parts.unet", "torch.jit._script", "deepspeed", "webdataset.filters"):
    for category in (DeprecationWarning, FutureWarning, ResourceWarning, UserWarning):
        warn(module, f"{module} {category.__name__}", category)
warn("tensorboard.default", "pkg_resources is deprecated as an API", UserWarning)
import logging
logging.basicConfig()
for name in ("xformers", "diffusers.models", "msdiff_dist.data"):
    logging.getLogger(name).warning(f"{name} warning")
    logging.getLogger(name).error(f"{name} error")
"""


def lines(before: str, **variables: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("MSDIFF_QUIET", "PYTHONWARNINGS")} | variables
    command = [sys.executable, "-W", "default", "-c", before + WARN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


@pytest.mark.parametrize("by", ["command", "variable"])
def test_only_what_users_can_use_is_shown(by: str) -> None:
    if by == "command":
        shown = lines("from msdiff_dist.third_party import quiet; quiet()")
    else:
        shown = lines("import msdiff_dist", MSDIFF_QUIET="1")
    text = "\n".join(shown)
    for category in ("DeprecationWarning", "FutureWarning", "ResourceWarning", "UserWarning"):
        assert f"msdiff_dist.export.posthoc {category}" in text
        assert f"my_parts.unet {category}" in text, "an extension of a user"
        for library in ("torch.jit._script", "deepspeed", "webdataset.filters"):
            assert (f"{library} {category}" in text) == (category == "UserWarning")
    assert "pkg_resources" not in text
    assert [f"{name} warning" in text for name in ("xformers", "diffusers.models", "msdiff_dist.data")] == [
        False, False, True,
    ]  # fmt: skip
    assert all(f"{name} error" in text for name in ("xformers", "diffusers.models", "msdiff_dist.data"))


SET_THEIR_LEVELS = """
import logging
import deepspeed
from diffusers.utils import logging as of_diffusers
from transformers.utils import logging as of_transformers
others = of_diffusers.get_logger("diffusers.x"), of_transformers.get_logger("transformers.x")
for logger in (logging.getLogger("DeepSpeed"), *others):
    logger.warning(f"{logger.name} warning")
    logger.error(f"{logger.name} error")
"""


def test_libraries_that_set_their_levels_when_imported_show_errors_only() -> None:
    code = "from msdiff_dist.third_party import quiet; quiet()" + SET_THEIR_LEVELS
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == 3, lines
    assert all(
        any(f"{name} error" in line for line in lines) for name in ("DeepSpeed", "diffusers.x", "transformers.x")
    )


def test_a_program_that_imports_the_package_sees_all_warnings() -> None:
    text = "\n".join(lines("import msdiff_dist"))
    assert "torch.jit._script DeprecationWarning" in text
    assert "pkg_resources" in text
