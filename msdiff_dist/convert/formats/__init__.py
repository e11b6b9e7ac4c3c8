"""The formats that `msdiff convert` knows, a module each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from msdiff_dist.convert.formats.deepspeed import read_deepspeed
from msdiff_dist.convert.formats.diffusers_folder import read_diffusers, write_diffusers
from msdiff_dist.convert.formats.export_folder import read_msdiff, write_export
from msdiff_dist.convert.formats.ldm import read_ldm, write_ldm_file
from msdiff_dist.convert.formats.official_edm import read_edm, write_edm
from msdiff_dist.convert.formats.official_scoresde import read_scoresde, write_scoresde
from msdiff_dist.convert.model_weights import ModelWeights, Written
from msdiff_dist.convert.options import ConvertOptions, OptionName
from msdiff_dist.convert.tensor_sources import TensorSource, open_source
from msdiff_dist.registry import Table

PLAIN = "safetensors"  # not in the table: a DeepSpeed folder's tensors under their own names, of any network


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format that `msdiff convert` knows.

    Args:
        read: reads a file or folder; returns its weights under our names, checked to be complete. None: cannot be read.
        write: writes weights to a new file or folder, with metadata for its header. None: cannot be written.
        read_options: the options that `read` uses. An option that neither side of a conversion uses is an error.
        write_options: the options that `write` uses.
        prefixes: beginnings of tensors' names by which this format is recognised. A checkpoint belongs to the first
            format of the table with a match.
        read_tensors: like `read`, from tensors in whatever container. None: the tensors alone do not determine the
            network.
    """

    read: Callable[[Path, ConvertOptions], ModelWeights] | None = None
    write: Callable[[ModelWeights, Path, ConvertOptions, Mapping[str, str]], Written] | None = None
    read_options: tuple[OptionName, ...] = ()
    write_options: tuple[OptionName, ...] = ()
    prefixes: tuple[str, ...] = ()
    read_tensors: Callable[[TensorSource, ConvertOptions], ModelWeights] | None = None


_LDM_READ: tuple[OptionName, ...] = (
    "weights", "key", "config", "num_heads", "head_channels", "prediction_type", "scale_factor", "null_class",
)  # fmt: skip
_LDM_WRITE: tuple[OptionName, ...] = ("model_ema", "null_class")
_SONG_READ: tuple[OptionName, ...] = ("weights", "key", "norm_groups", "boundaries")

FORMATS: Table[Format] = Table(
    "format",
    {
        "official-scoresde": Format(
            read=read_scoresde,
            write=lambda weights, path, options, metadata: write_scoresde(weights, path, metadata),
            read_options=_SONG_READ,
            prefixes=("en_modules.", "all_modules.", "module.en_modules.", "module.all_modules."),
        ),
        "official-ldm": Format(  # after official-scoresde, whose checkpoints have names in de_modules too
            read=lambda path, options: read_ldm(
                open_source(path, options.wanted("official-ldm")), options, multistage=True
            ),
            write=lambda weights, path, options, metadata: write_ldm_file(weights, path, options, metadata, True),
            read_options=(*_LDM_READ, "boundaries"),
            write_options=_LDM_WRITE,
            prefixes=("model.diffusion_model.de_modules.", "de_modules.", "diffusion_model.de_modules."),
            read_tensors=lambda source, options: read_ldm(source, options, multistage=True),
        ),
        "ldm": Format(
            read=lambda path, options: read_ldm(open_source(path, options.wanted("ldm")), options),
            write=write_ldm_file,
            read_options=_LDM_READ,
            write_options=_LDM_WRITE,
            prefixes=("model.diffusion_model.input_blocks.", "input_blocks.", "diffusion_model.input_blocks."),
            read_tensors=read_ldm,
        ),
        "msdiff": Format(
            read=read_msdiff,
            write=lambda weights, path, options, metadata: write_export(weights, path, metadata),
            read_options=("weights",),
            prefixes=("shared.", "stages.0."),
        ),
        "diffusers": Format(
            read=read_diffusers,
            write=lambda weights, path, options, metadata: write_diffusers(weights, path, metadata),
            read_options=("weights", "boundaries", "prediction_type", "scale_factor"),
            prefixes=("down_blocks.", "conv_in."),
        ),
        "official-edm": Format(
            read=lambda path, options: read_edm(open_source(path, options.wanted("official-edm")), options),
            write=lambda weights, path, options, metadata: write_edm(weights, path, metadata),
            read_options=_SONG_READ,
            prefixes=("model.enc.", "enc.", "model.decs.", "decs."),
        ),
        # A container: which of these count depends on the network that is found in it, and the others are refused.
        "deepspeed": Format(
            read=read_deepspeed,
            read_options=(*(name for name in _LDM_READ if name != "key"), "boundaries"),
        ),
    },
)


def readable() -> list[str]:
    """Names of the formats that can be converted from."""
    return [name for name, known in FORMATS.items() if known.read is not None]


def writable() -> list[str]:
    """Names of the formats that can be converted to."""
    return [*(name for name, known in FORMATS.items() if known.write is not None), PLAIN]
