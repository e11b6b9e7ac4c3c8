"""What other libraries print and warn of in our commands, and why users need not see it: one place for all of them.

Errors pass, and so do warnings of this package and of packages that extend it. The `msdiff` command calls `quiet`, and
says so to the processes that it starts in their environment: ranks, loader workers, jobs. A program that imports this
package sees every warning.
"""

from __future__ import annotations

import logging
import os
import warnings

VARIABLE = "MSDIFF_QUIET"
"""Environment variable of processes that `msdiff` started."""

# What a library means for the authors of programs, as we are: what it will change or remove, and files that it leaves
# to the garbage collector. Users can do nothing about it; the tests see it.
_FOR_AUTHORS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning, ImportWarning)
_LIBRARIES = (
    "accelerate", "deepspeed", "diffusers", "fairscale", "fsspec", "google", "huggingface_hub", "matplotlib", "numpy",
    "omegaconf", "open_clip", "PIL", "pkg_resources", "pydantic", "s3fs", "safetensors", "setuptools", "sklearn",
    "streaming", "submitit", "tensorboard", "timm", "tokenizers", "torch", "torchvision", "transformers", "triton",
    "typer", "webdataset", "xformers", "yaml",
    "<frozen importlib", "importlib", "multiprocessing",  # on behalf of a library that is imported, or that forks
)  # fmt: skip

_MESSAGES = {
    r"pkg_resources is deprecated": "tensorboard and others still import it; setuptools warns whoever does",
    r"Failed to load image Python extension": "torchvision's own readers of images, which are not used",
    r"Can't initialize (NVML|amdsmi)": "DeepSpeed and torch ask for GPUs where there are none",
    r"Palette images with Transparency": "PIL; transparency is handled as the recipe says",
    r"Corrupt EXIF data": "PIL; the image is read all the same",
    r"Truncated File Read": "PIL, of metadata; an image that cannot be read is reported as skipped",
}
"""Beginnings of warnings that are of no use, with who warns and why it does not matter."""

_LOGGERS = {
    "xformers": "an extension that does not load, also where nothing uses it; where a recipe does, a check says so",
    "DeepSpeed": "its settings, line by line, on every rank",
    "accelerate": "that it is not configured; diffusers imports it",
    "diffusers": "fields of other versions in configurations, which conversion reports itself",
    "transformers": "the same, and that flax or tensorflow are missing",
    "open_clip": "that a tower begins without weights, which are loaded next",
    "torch.utils.flop_counter": "that triton is missing",
    "torch.distributed.elastic.multiprocessing.redirects": "that redirects are not supported on this system",
    "fsspec": "retries, which are reported here with their number",
    "matplotlib": "that it builds its cache of fonts",
    "PIL": "chunks of images that it skips",
    "numexpr": "how many threads it takes",
}
"""Loggers of which only errors are shown, with what they say otherwise."""


class _OnlyErrors(logging.Logger):
    """A logger that shows errors only, whatever level it is given later.

    DeepSpeed, diffusers and transformers set theirs to WARNING when they are imported, which is after `apply`.
    """

    def setLevel(self, level: int | str) -> None:
        super().setLevel(level)
        self.level = max(self.level, logging.ERROR)


def quiet() -> None:
    """Show nothing of the above in this process and in those that it starts."""
    os.environ[VARIABLE] = "1"
    apply()


def apply() -> None:
    """Show nothing of the above in this process."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.__class__ = _OnlyErrors
        logger.setLevel(logging.ERROR)
    modules = "|".join(name.replace(".", r"\.") for name in _LIBRARIES)
    for category in _FOR_AUTHORS:
        warnings.filterwarnings("ignore", category=category, module=rf"({modules})(\.|\b)")
    for beginning in _MESSAGES:
        warnings.filterwarnings("ignore", message=beginning)
