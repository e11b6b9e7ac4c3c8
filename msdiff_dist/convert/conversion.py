"""Conversion of a checkpoint: read into `ModelWeights`, written in another format, with a report of every key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from msdiff_dist import __version__
from msdiff_dist.config import to_mapping
from msdiff_dist.convert.edit.merge import merge
from msdiff_dist.convert.edit.stages import extract_stage
from msdiff_dist.convert.formats import FORMATS, PLAIN, readable, writable
from msdiff_dist.convert.formats.deepspeed import DeepspeedSource
from msdiff_dist.convert.model_weights import ModelWeights, Written
from msdiff_dist.convert.options import FLAGS, ConvertOptions
from msdiff_dist.convert.writing import appearing, write_safetensors
from msdiff_dist.diffusion.config import of_stage, settings_of_stages
from msdiff_dist.errors import CheckpointError, ConfigError, did_you_mean
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.files.digest import sha256_of
from msdiff_dist.terminal import LongWork

REPORT = "conversion_report.json"
"""File name of the report: what became of every key, and what was assumed."""


def convert(
    src: Path | Sequence[Path], dst: Path, from_format: str, to_format: str, options: ConvertOptions | None = None
) -> dict[str, Any]:
    """Convert a checkpoint; returns the report, which is also written: inside `dst` if a folder, beside it if a file.

    Nothing appears at `dst` unless everything succeeded.

    Args:
        src: a file or folder; or several, unified models that become the stages of one, the first nearest the data.
            Each stage keeps an encoder of its own.

    Raises:
        ConfigError: a format is unknown, or an option is given that this conversion does not use.
        CheckpointError: the source cannot be read or carried exactly, or `dst` cannot be written.
    """
    options = options or ConvertOptions()
    _check_known("--from", from_format, readable())
    _check_known("--to", to_format, writable())
    sources = [src] if isinstance(src, Path) else list(src)
    _check_used(options, from_format, to_format, len(sources))
    if to_format == PLAIN:
        return _plain(sources[0], dst, from_format)
    if len(sources) == 1:
        weights, path = read(sources[0], from_format, options), str(sources[0])
        return write(weights, dst, to_format, options, {"path": path, "format": from_format})
    paths = [str(path) for path in sources]
    return write(_read_several(sources, from_format, options), dst, to_format, options,
                 {"path": paths, "format": from_format})  # fmt: skip


def _read_several(sources: Sequence[Path], from_format: str, options: ConvertOptions) -> ModelWeights:
    """Unified models as the stages of one, each with an encoder of its own."""
    names = [str(path) for path in sources]
    if options.boundaries is None or len(options.boundaries) != len(sources) - 1:
        given = None if options.boundaries is None else list(options.boundaries)
        raise ConfigError(
            "--boundaries", given, f"do not divide time among the {len(sources)} sources {', '.join(names)}",
            f"Give {len(sources) - 1}, ascending; the first source is the stage nearest the data.",
        )  # fmt: skip
    of_each = replace(options, boundaries=None)  # a source is unified, so it has none
    models = []
    for path in sources:
        try:
            models.append(read(path, from_format, of_each))
        except CheckpointError as e:
            raise CheckpointError(f"{path}: {e.field}", e.value, e.problem, e.remedy) from None
    return merge(models, options.boundaries, share=False, names=names)


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
    if to_format != "msdiff":
        weights = _of_one_prediction(weights, to_format)
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
            for i, note in enumerate(weights.notes):
                name = note.name if note.name.startswith("LICENSE") else f"SOURCE_{note.name}"
                taken = (aside / name).exists() and (aside / name).read_bytes() != note.read_bytes()
                shutil.copy(note, aside / (f"{name}.{i}" if taken else name))
            _save(report, aside / REPORT)
    if dst.is_file():
        _save(report, dst.with_name(REPORT))
    return report


def _of_one_prediction(weights: ModelWeights, to_format: str) -> ModelWeights:
    """The weights, described as a model whose network predicts one thing in all stages.

    Raises:
        CheckpointError: it predicts different things.
    """
    description = weights.description
    if not description.stages.objectives:
        return weights
    settings = settings_of_stages(description.diffusion, description.stages)
    predicted = list(dict.fromkeys(getattr(one, "prediction_type", None) for one in settings))
    if len(predicted) > 1:
        raise CheckpointError(
            "stages.objectives", predicted, f"{to_format} holds models that predict the same in all stages",
            "Use --to msdiff, or convert one stage with --stage.",
        )  # fmt: skip
    one = replace(
        description,
        diffusion=of_stage(description.diffusion, description.stages, 0),
        stages=replace(description.stages, objectives=()),
    )
    return replace(weights, description=one)


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


def _check_used(options: ConvertOptions, from_format: str, to_format: str, sources: int) -> None:
    """Raise if an option is given that neither the reader nor the writer uses: it would change nothing.

    Raises:
        ConfigError: naming the option and those that this conversion takes; or there are several sources for a format
            that holds one.
    """
    if sources > 1 and to_format == PLAIN:
        raise ConfigError("--to", PLAIN, f"writes the tensors of one source, and {sources} are given", "Name one.")
    if sources > 1 and options.stage is not None:
        raise ConfigError(
            "--stage", options.stage, f"takes a stage of one source, and {sources} are given", "Extract it first."
        )
    plain = to_format == PLAIN  # writes every tensor as it is, so there is nothing to choose
    used = set() if plain else {*FORMATS[from_format].read_options, *FORMATS[to_format].write_options}
    # A flag --no-... says the opposite of its field.
    given = {FLAGS[name]: not value if value is False else value for name, value in options.given().items()}
    if sources > 1:
        used.add("boundaries")
    taken = [flag for name, flag in FLAGS.items() if name in used]
    if not plain and sources == 1:
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
    """The SHA-256 of each file, by its name; by its path, where files of several sources have one name."""
    named = len({path.name for path in files}) == len(files)
    with LongWork("reading", sum(path.stat().st_size for path in files), "MB") as work:
        return {path.name if named else str(path): sha256_of(path, work.advance) for path in files}


def _check_known(option: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ConfigError(option, name, "is not a known format", did_you_mean(name, known))
