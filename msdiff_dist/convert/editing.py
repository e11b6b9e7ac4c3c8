"""Models made from models, by path: grown, merged, and single stages extracted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msdiff_dist.convert.conversion import convert, read, write
from msdiff_dist.convert.edit import stages
from msdiff_dist.convert.options import ConvertOptions


def grow(
    src: Path,
    dst: Path,
    boundaries: Sequence[float],
    widths: Sequence[int],
    attention: Sequence[tuple[int, ...]] | None = None,
    from_format: str = "msdiff",
) -> dict[str, Any]:
    """Write the export of a multi-stage model grown from a unified one; returns the conversion report.

    The encoder is copied, and each decoder is the unified model's: the same where its width and attention are, else by
    the channel rule of `models.ldm.widths`.

    Args:
        boundaries: inner stage boundaries.
        widths: of each decoder, stage 0 first.
        attention: downsampling factors with attention, of each decoder; None keeps the unified model's.

    Raises:
        ConfigError, CheckpointError: as `convert`, and where the model cannot be grown so.
    """
    options = ConvertOptions()
    grown = stages.grow(read(src, from_format, options), tuple(boundaries), tuple(widths), attention)
    return write(grown, dst, "msdiff", options, {"path": str(src), "format": from_format})


def merge(
    models: Sequence[Path], dst: Path, boundaries: Sequence[float], from_format: str = "msdiff"
) -> dict[str, Any]:
    """Write the export of unified models put together as the stages of one, the first nearest the data.

    Where their encoders are the same, bit by bit, they become the one shared encoder; else each stage keeps its own.

    Raises:
        ConfigError, CheckpointError: as `convert`, and where the models do not fit each other.
    """
    options = ConvertOptions()
    merged = stages.merge([read(path, from_format, options) for path in models], boundaries)
    return write(merged, dst, "msdiff", options, {"path": [str(p) for p in models], "format": from_format})


def extract(src: Path, dst: Path, stage: int, from_format: str = "msdiff") -> dict[str, Any]:
    """Write one stage of a multi-stage model, with its encoder, as the export of a unified model.

    Raises:
        ConfigError, CheckpointError: as `convert`, and where there is no such stage.
    """
    return convert(src, dst, from_format, "msdiff", ConvertOptions(stage=stage))
