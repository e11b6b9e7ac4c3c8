"""The formats that `msdiff convert` knows, a module each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from msdiff_dist.convert.formats.deepspeed import read_deepspeed
from msdiff_dist.convert.formats.diffusers_folder import read_diffusers, write_diffusers
from msdiff_dist.convert.formats.export_folder import read_export, write_export
from msdiff_dist.convert.formats.ldm import read_ldm, write_ldm_file
from msdiff_dist.convert.formats.official_edm import read_edm, write_edm
from msdiff_dist.convert.formats.official_scoresde import read_scoresde, write_scoresde
from msdiff_dist.convert.model_weights import ModelWeights, Written
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.convert.tensor_sources import TensorSource, open_source
from msdiff_dist.registry import Table

PLAIN = "safetensors"  # the tensors of a DeepSpeed folder under their own names, whatever network they are of


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format that `msdiff convert` knows.

    Args:
        read: (file or folder, options) to weights, checked and mapped to our names.
        write: (weights, new file or folder, options, metadata of the file) to what was written.
        marks: how tensors' names begin in this format; the first format of the table that has one of them claims them.
        read_tensors: (tensors, options) to weights, where the names of its tensors tell a network in any container.
    """

    read: Callable[[Path, ConvertOptions], ModelWeights] | None = None
    write: Callable[[ModelWeights, Path, ConvertOptions, Mapping[str, str]], Written] | None = None
    marks: tuple[str, ...] = ()
    read_tensors: Callable[[TensorSource, ConvertOptions], ModelWeights] | None = None


FORMATS: Table[Format] = Table(
    "format",
    {
        "official-scoresde": Format(
            read=read_scoresde,
            write=lambda weights, path, options, metadata: write_scoresde(weights, path, metadata),
            marks=("en_modules.", "all_modules.", "module.en_modules.", "module.all_modules."),
        ),
        "official-ldm": Format(  # after official-scoresde: both have de_modules
            read=lambda path, options: read_ldm(open_source(path), options, multistage=True),
            write=lambda weights, path, options, metadata: write_ldm_file(weights, path, options, metadata, True),
            marks=("model.diffusion_model.de_modules.", "de_modules.", "diffusion_model.de_modules."),
            read_tensors=lambda source, options: read_ldm(source, options, multistage=True),
        ),
        "ldm": Format(
            read=lambda path, options: read_ldm(open_source(path), options),
            write=write_ldm_file,
            marks=("model.diffusion_model.input_blocks.", "input_blocks.", "diffusion_model.input_blocks."),
            read_tensors=read_ldm,
        ),
        "msdiff": Format(
            read=read_export,
            write=lambda weights, path, options, metadata: write_export(weights, path, metadata),
            marks=("shared.", "stages.0."),
        ),
        "diffusers": Format(
            read=read_diffusers,
            write=lambda weights, path, options, metadata: write_diffusers(weights, path, metadata),
            marks=("down_blocks.", "conv_in."),
        ),
        "official-edm": Format(
            read=lambda path, options: read_edm(open_source(path), options),
            write=lambda weights, path, options, metadata: write_edm(weights, path, metadata),
            marks=("model.enc.", "enc.", "model.decs.", "decs."),
        ),
        "deepspeed": Format(read=read_deepspeed),
    },
)


def readable() -> list[str]:
    """Formats that can be converted from."""
    return [name for name, known in FORMATS.items() if known.read is not None]


def writable() -> list[str]:
    """Formats that can be converted to."""
    return [*(name for name, known in FORMATS.items() if known.write is not None), PLAIN]
