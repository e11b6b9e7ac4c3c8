"""`msdiff init`: new recipe files, copied from shipped ones or written around an existing model to train it further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msdiff_dist.apps.finetuning_recipe import InitChoices, is_text_to_image, start_finetuning
from msdiff_dist.apps.recipe_for_data import copy_for_data
from msdiff_dist.apps.recipe_text import recipe_text
from msdiff_dist.checkpoint.layout import INDEX, checkpoints_below
from msdiff_dist.checkpoint.what_is import what_is
from msdiff_dist.config import to_mapping
from msdiff_dist.convert.recognition import format_at
from msdiff_dist.diffusion.augmentation import AUGMENT_LABELS
from msdiff_dist.errors import CheckpointError, ConfigError
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.export.weights import CONFIG, CheckpointWeights, ExportWeights, export_folder, open_checkpoint
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.recipe import Recipe, stored_recipe
from msdiff_dist.shipped import Copied, copy_shipped, refuse_existing

_COMMENTS = {
    "data": "Fill in `shards`. The samples have to fit the model.",
    "optimizer": "Set the learning rate for your data and batch size.",
    "train": "Set steps and batch size. Training starts from the weights of `init_from`.",
}
_FINETUNING_COMMENTS = {
    "data": "Latents and embedded captions, which `msdiff data encode` makes of the images under `encode`.",
    "encode": "`resize: cover` scales and crops images of other sizes; `moments` is the autoencoder's whole posterior.",
    "optimizer": "Set the learning rate for your data and batch size.",
    "train": "Set steps and batch size. Training starts from the weights of `init_from`.",
}
_CAPTION_TOKENS = 77  # context length of CLIP's text towers, for models that do not say theirs


def init_recipe(name: str | None, source: Path | None, out: Path | None, choices: InitChoices | None = None) -> Copied:
    """Write the shipped file `name`, or a recipe that continues from the weights of `source`, to `out`.

    From the folder of a Stable Diffusion the start weights are written too, beside `out`.

    Raises:
        ConfigError: both or neither of the two are given, there is no such file, or `out` exists.
        CheckpointError: `source` holds no model of this package; the error names the command that converts it, if any.
    """
    choices = choices or InitChoices()
    if name is not None and source is None:
        _refuse(choices, ("boundaries", "widths"), "are for the folder of a Stable Diffusion", "Edit the copy.")
        return copy_shipped(name, out) if choices.data is None else copy_for_data(name, out, choices.data, choices.size)
    if source is None or name is not None:
        given = "both are given" if name else "neither is given"
        raise ConfigError("NAME", name, f"either NAME or --from is needed, and {given}", "See `msdiff recipes`.")
    if source.is_dir() and is_text_to_image(source):
        return _init_finetuning(source, out, choices)
    recipe, origin = continuation(source)
    remedy = "Edit the recipe; `msdiff grow` makes stages of a unified model."
    _refuse(choices, ("data", "size", "boundaries", "widths"), "has no effect on a model's own recipe", remedy)
    out = out or Path(f"{recipe.name}.yaml")
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    commands = [f"msdiff plan {out} --world-size 1", f"msdiff train {out}"]
    atomic_write(out, recipe_text(recipe, f"Continues from {origin}.", commands, _COMMENTS))
    return Copied([out], [])


def _init_finetuning(source: Path, out: Path | None, choices: InitChoices) -> Copied:
    out = out or Path(f"{source.resolve().name}_stages.yaml")
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe, start = start_finetuning(source, out, choices)
    run = Path("runs") / recipe.name
    commands = [
        f"msdiff data encode {out} --out {recipe.data.shards}",
        f"msdiff plan {out}",
        f"msdiff train {out} --run-dir {run}",
        f'msdiff sample {run} --prompt "..." --guidance 7.5 --out {run}-images',
        f"msdiff convert {run} {run}-diffusers --from msdiff --to diffusers",
    ]
    stages = recipe.stages.num_stages
    title = f"Trains {source} further, in {stages} stage{'s' * (stages > 1)}."
    atomic_write(out, recipe_text(recipe, title, commands, _FINETUNING_COMMENTS))
    return Copied([out, start], [])


def _refuse(choices: InitChoices, fields: tuple[str, ...], problem: str, remedy: str) -> None:
    """Raise if one of the fields is given.

    Raises:
        ConfigError: naming its option.
    """
    for field in fields:
        value = getattr(choices, field)
        if value is not None:
            raise ConfigError(f"--{field}", value if isinstance(value, (str, int)) else list(value), problem, remedy)


def continuation(source: Path) -> tuple[Recipe, str]:
    """A recipe that starts from the averaged weights of an export, checkpoint or run, and those weights in words.

    A checkpoint holds its recipe, which is taken as it is. An export holds the sections that describe the model; the
    other sections get values to begin with.

    Raises:
        CheckpointError: there is no such model. ConfigError: no file gives the size of its samples.
    """
    folder = export_folder(source)
    if folder is not None and not _is_foreign_folder(folder):
        description = ExportWeights(folder).description
        mapping = _recipe_around(description)
        step, init_from = description.step, folder
    elif folder is None and _is_of_run(source):
        reader = CheckpointWeights(open_checkpoint(source)).reader
        mapping, step, init_from = dict(reader.index.recipe), reader.index.step, reader.folder
    else:
        raise _to_be_converted(source)
    origin = f"{mapping['name'] or source.name}{'' if step is None else f' after {step} steps'}, {init_from}"
    mapping["name"] = f"{mapping['name'] or source.name}_continued"
    mapping["train"] = {**mapping["train"], "init_from": str(init_from)}
    return stored_recipe(mapping), origin


def _recipe_around(description: ModelDescription) -> dict[str, Any]:
    """The sections of a recipe that trains the described model."""
    model = description.model
    mapping: dict[str, Any] = {
        "name": description.name,
        "data": _data(description),
        "optimizer": {"lr": 1e-5},
        "train": {"steps": 100000, "global_batch_size": 96, "precision": description.precision},
    }
    mapping |= {
        part: to_mapping(getattr(description, part)) for part in ("model", "stages", "diffusion", "autoencoder")
    }
    if description.text_encoder is not None:
        mapping["text_encoder"] = to_mapping(description.text_encoder)
    if description.extensions:
        mapping["extensions"] = list(description.extensions)
    if model.takes_context or model.takes_label:
        mapping["train"]["condition_dropout"] = 0.1
    if model.augment_labels == AUGMENT_LABELS:
        mapping["augmentation"] = {"probability": 0.12}
    return mapping


def _data(description: ModelDescription) -> dict[str, Any]:
    """The section `data` for samples of the model's shape: images if it works on pixels, else latents."""
    model = description.model
    channels, height, width = description.latent_shape
    data: dict[str, Any] = {"shards": "path/to/shards", "lanes": 96, "num_classes": model.num_classes}
    if description.autoencoder.kind == "pixel" and channels in (1, 3) and height == width:
        data |= {"kind": "image", "image_size": height, "channels": channels}
    else:
        data |= {"kind": "latent", "latent_shape": [channels, height, width]}
    if model.context_channels is not None:
        data["context_shape"] = description.context_shape or (_CAPTION_TOKENS, model.context_channels)
    return data


def _is_foreign_folder(folder: Path) -> bool:
    """Whether a folder with a config.json was written by diffusers and is no export."""
    return '"_class_name"' in (folder / CONFIG).read_text()


def _is_of_run(source: Path) -> bool:
    """Whether a path is a run folder, a checkpoint, or in one."""
    folder = source.parent if source.is_file() else source
    return (folder / INDEX).is_file() or (source / "checkpoints").is_dir() or bool(checkpoints_below(source))


def _to_be_converted(source: Path) -> CheckpointError:
    """The error for a source that holds no model of this package, with the command that converts it, if any."""
    if not source.exists():
        return CheckpointError("--from", str(source), "no such file or folder", "Name an export, checkpoint or run.")
    format_ = format_at(source)
    if format_ is None:
        return CheckpointError("--from", str(source), *what_is(source))
    return CheckpointError(
        "--from", str(source), f"holds weights of another program ({format_})",
        f"Convert them first: `msdiff convert {source} converted --from {format_} --to msdiff`, "
        "then `msdiff init --from converted`.",
    )  # fmt: skip
