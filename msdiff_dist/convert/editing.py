"""The commands `grow`, `merge` and `extract`: open models by path, edit them (`convert.edit`), write the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msdiff_dist.convert.conversion import convert, read, write
from msdiff_dist.convert.edit import stages
from msdiff_dist.convert.edit.merge import merge as merged_model
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

    The encoder is copied. Each decoder is an exact copy of the unified model's if its width and attention are the same;
    otherwise it is made by the channel rule of `models.ldm.widths`.

    Args:
        src: the unified model, in any format that can be read.
        dst: the new export folder.
        boundaries: inner stage boundaries, in the process's own time.
        widths: width of each decoder, stage 0 first.
        attention: downsampling factors with attention for each decoder; None keeps the unified model's.
        from_format: the format of `src`.

    Raises:
        ConfigError: as `convert`, or the widths or boundaries do not make a model.
        CheckpointError: as `convert`.
    """
    options = ConvertOptions()
    grown = stages.grow(read(src, from_format, options), tuple(boundaries), tuple(widths), attention)
    return write(grown, dst, "msdiff", options, {"path": str(src), "format": from_format})


def merge(
    models: Sequence[Path], dst: Path, boundaries: Sequence[float], from_format: str = "msdiff"
) -> dict[str, Any]:
    """Write the export of one model whose stages are unified models; returns the conversion report.

    The first model becomes stage 0, nearest the data. If all encoders are equal bit by bit, they become the one shared
    encoder; otherwise each stage keeps its own.

    Raises:
        ConfigError: as `convert`, or the models do not make one (`convert.edit.merge`).
        CheckpointError: as `convert`.
    """
    options = ConvertOptions()
    opened = [read(path, from_format, options) for path in models]
    merged = merged_model(opened, boundaries, names=[str(path) for path in models])
    return write(merged, dst, "msdiff", options, {"path": [str(p) for p in models], "format": from_format})


def extract(src: Path, dst: Path, stage: int, from_format: str = "msdiff") -> dict[str, Any]:
    """Write one stage of a multi-stage model, with its encoder, as the export of a unified model.

    Returns the conversion report.

    Raises:
        ConfigError: as `convert`, or there is no such stage.
        CheckpointError: as `convert`.
    """
    return convert(src, dst, from_format, "msdiff", ConvertOptions(stage=stage))
