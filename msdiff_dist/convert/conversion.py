"""Conversion of a checkpoint: read into `ModelWeights`, written in another format, with a report of every key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msdiff_dist import __version__
from msdiff_dist.config import to_mapping
from msdiff_dist.convert.edit.stages import extract_stage
from msdiff_dist.convert.formats import FORMATS, PLAIN, readable, writable
from msdiff_dist.convert.formats.deepspeed import DeepspeedSource
from msdiff_dist.convert.model_weights import ModelWeights, Written
from msdiff_dist.convert.options import FLAGS, ConvertOptions
from msdiff_dist.convert.writing import appearing, write_safetensors
from msdiff_dist.errors import ConfigError, did_you_mean
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.files.digest import sha256_of
from msdiff_dist.terminal import LongWork

REPORT = "conversion_report.json"
"""File name of the report: what became of every key, and what was assumed."""


def convert(
    src: Path, dst: Path, from_format: str, to_format: str, options: ConvertOptions | None = None
) -> dict[str, Any]:
    """Convert a checkpoint; returns the report, which is also written: inside `dst` if a folder, beside it if a file.

    Nothing appears at `dst` unless everything succeeded.

    Raises:
        ConfigError: a format is unknown, or an option is given that this conversion does not use.
        CheckpointError: the source cannot be read or carried exactly, or `dst` cannot be written.
    """
    options = options or ConvertOptions()
    _check_known("--from", from_format, readable())
    _check_known("--to", to_format, writable())
    _check_used(options, from_format, to_format)
    if to_format == PLAIN:
        return _plain(src, dst, from_format)
    weights = read(src, from_format, options)
    return write(weights, dst, to_format, options, {"path": str(src), "format": from_format})


def read(src: Path, from_format: str, options: ConvertOptions) -> ModelWeights:
    """Open a checkpoint of any format; where `options.stage` names a stage, that stage alone.

    Raises:
        ConfigError: the format is unknown, or there is no such stage.
        CheckpointError: the checkpoint cannot be read.
    """
    _check_known("--from", from_format, readable())
    reader = FORMATS[from_format].read
    assert reader is not None
    weights = reader(src, options)
    return weights if options.stage is None else extract_stage(weights, options.stage)


def write(
    weights: ModelWeights, dst: Path, to_format: str, options: ConvertOptions, source: Mapping[str, Any]
) -> dict[str, Any]:
    """Write weights in any format; returns the report, which is also written.

    Args:
        source: `path` and `format` of the origin, for the report and the file's metadata.

    Raises:
        ConfigError: the format is unknown.
        CheckpointError: the format does not have such a model, or `dst` cannot be written.
    """
    _check_known("--to", to_format, writable())
    writer = FORMATS[to_format].write
    assert writer is not None
    digests = _digests(_source_files(weights))
    metadata = {
        **_kept_metadata(weights),
        "converter": f"msdiff_dist {__version__}",
        "source_format": str(source["format"]),
        "source_sha256": json.dumps(digests),
    }
    with appearing(dst) as aside:
        written = writer(weights, aside, options, metadata)
        report = _report(weights, written, dst, to_format, {**source, "sha256": digests})
        if aside.is_dir():
            # Licences keep their names; other notes, such as a README, are about the source and not about the result.
            for note in weights.notes:
                shutil.copy(note, aside / (note.name if note.name.startswith("LICENSE") else f"SOURCE_{note.name}"))
            _save(report, aside / REPORT)
    if dst.is_file():
        _save(report, dst.with_name(REPORT))
    return report


def _plain(src: Path, dst: Path, from_format: str) -> dict[str, Any]:
    """Write the weights of a DeepSpeed folder under their own names, whatever network they are of."""
    if from_format != "deepspeed":
        raise ConfigError(
            "--to", PLAIN, "writes the weights of a DeepSpeed folder under their own names",
            "Use --from deepspeed, or another --to.",
        )  # fmt: skip
    if dst.suffix != ".safetensors":
        raise ConfigError("DST", str(dst), "is to be one file", "Let its name end in .safetensors.")
    source = DeepspeedSource(src)
    with appearing(dst) as aside:
        digest = write_safetensors(aside, source, {"converter": f"msdiff_dist {__version__}"})
    report = {
        "source": {"path": str(src), "format": from_format, "sha256": _digests(source.files)},
        "result": {"path": str(dst), "format": PLAIN, "sha256": {dst.name: digest}},
        "keys": {k: {"to": [k]} for k in source.names()} | {k: {"left_out": v} for k, v in source.left_out.items()},
        "assumed": [],
        "remarks": [],
    }
    _save(report, dst.with_name(REPORT))
    return report


def _report(
    weights: ModelWeights, written: Written, dst: Path, to_format: str, source: Mapping[str, Any]
) -> dict[str, Any]:
    """The report. Its `keys` account for every key of the source: converted, or left out with the reason."""
    keys: dict[str, Any] = {
        key: {"to": [target for name in names for target in written.names[name]]}
        for key, names in weights.used.items()
        if any(name in written.names for name in names)
    }
    keys |= {key: {"left_out": reason} for key, reason in weights.left_out.items()}
    keys |= {key: {"left_out": "the target format has no place for it"} for key in weights.used if key not in keys}
    return {
        "source": dict(source),
        "result": {"path": str(dst), "format": to_format, "sha256": written.files},
        "description": to_mapping(weights.description),
        "keys": keys,
        "added": written.added,
        "assumed": weights.assumed,
        "remarks": written.remarks,
        "licence_notes": [p.name for p in weights.notes],
    }


def _save(report: Mapping[str, Any], path: Path) -> None:
    atomic_write(path, json.dumps(report, indent=1) + "\n")


def _check_used(options: ConvertOptions, from_format: str, to_format: str) -> None:
    """Raise if an option is given that neither the reader nor the writer uses: it would change nothing.

    Raises:
        ConfigError: naming the option and those that this conversion takes.
    """
    plain = to_format == PLAIN  # writes every tensor as it is, so there is nothing to choose
    used = set() if plain else {*FORMATS[from_format].read_options, *FORMATS[to_format].write_options}
    # A flag --no-... says the opposite of its field.
    given = {FLAGS[name]: not value if value is False else value for name, value in options.given().items()}
    taken = [flag for name, flag in FLAGS.items() if name in used]
    if not plain:
        taken.append("--stage")
    elif options.stage is not None:
        given["--stage"] = options.stage
    for flag, value in given.items():
        if flag not in taken:
            choices = f"Remove it; {', '.join(taken)} can be given." if taken else "Remove it."
            raise ConfigError(flag, value, f"is not used in a conversion from {from_format} to {to_format}", choices)


def _kept_metadata(weights: ModelWeights) -> dict[str, str]:
    """Metadata of the source for the result's header, without the fields that a conversion sets itself."""
    ours = ("format", "converter", "source_format", "source_sha256")
    return {k: v for k, v in weights.tensors.metadata.items() if k not in ours}


def _source_files(weights: ModelWeights) -> list[Path]:
    """The files that the tensors come from, each once."""
    files = [*weights.tensors.files]
    for frozen in (weights.autoencoder_weights, weights.text_encoder_weights):
        if frozen is not None:
            files += frozen.tensors.files
    return list(dict.fromkeys(files))


def _digests(files: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of each file, by its name."""
    with LongWork("reading", sum(path.stat().st_size for path in files), "MB") as work:
        return {path.name: sha256_of(path, work.advance) for path in files}


def _check_known(option: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ConfigError(option, name, "is not a known format", did_you_mean(name, known))
