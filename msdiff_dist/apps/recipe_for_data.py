"""`msdiff init NAME --data SHARDS`: a shipped recipe, changed to fit shards of a user's images."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdiff_dist.apps.train.found_data import find_data
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.image_files import IMAGE_FIELDS, UNREADABLE, ImageReading, read_image
from msdiff_dist.data.index import Shard
from msdiff_dist.data.latent_blocks import BLOCK_FIELD
from msdiff_dist.data.make.shard_writer import DATASET_INFO
from msdiff_dist.data.tar_members import TarError, samples
from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.files.json_text import parse_mapping
from msdiff_dist.files.yaml_text import with_values
from msdiff_dist.models.ldm.config import LDMConfig
from msdiff_dist.recipe import Recipe, load_recipe, recipe_mapping
from msdiff_dist.shipped import Copied, copy_shipped, find_shipped

_LOOKED_AT = 100  # images, to see whether they have colours and one size


@dataclass(frozen=True, kw_only=True)
class ImagesFound:
    """What the first images of some shards look like.

    Attributes:
        shards: where they are.
        colours: whether any image has colours.
        size: height and width, if all have the same and are squares.
        captions: whether every sample has a caption.
        num_classes: number of classes; None without classes.
    """

    shards: str
    colours: bool
    size: int | None
    captions: bool
    num_classes: int | None


def copy_for_data(name: str, out: Path | None, data: str, size: int | None) -> Copied:
    """Copy a shipped recipe, changed so that it trains on shards of images.

    A recipe that trains on pixels gets the shards as its `data`, with their channels and classes. One that trains on
    latents of an autoencoder gets them as `encode.data`, to be encoded first.

    Args:
        data: as `data.shards`.
        size: pixels a side; None keeps the recipe's.

    Raises:
        DataError: the shards cannot be read, or do not hold what the recipe's model needs.
        ConfigError: what `copy_shipped` refuses, or the model cannot work on images of this size.
    """
    shipped = find_shipped(name)
    if shipped.kind != "recipe":
        raise ConfigError("NAME", name, f"is no recipe but an {shipped.kind} file", "Leave --data out.")
    out = out or Path(shipped.path.name)
    fields = _fields(out.stem, load_recipe(shipped.path), data, size)
    load_recipe(shipped.path, [f"{field}={json.dumps(value)}" for field, value in fields.items()])  # before writing
    copied = copy_shipped(name, out)
    # The header is about the shipped recipe's own data and what to expect of them.
    body = re.sub(r"\A(#[^\n]*\n)+", "", out.read_text())
    commands = [f"msdiff train {out}"]
    if "encode.data.shards" in fields:
        commands.insert(0, f"msdiff data encode {out} --out {fields['data.shards']}")
    header = [f"{shipped.name} for the images in {data}.", "", *(f"  {command}" for command in commands)]
    atomic_write(out, "".join(f"# {line}".rstrip() + "\n" for line in header) + with_values(body, fields))
    return copied


def _fields(name: str, recipe: Recipe, data: str, size: int | None) -> dict[str, Any]:
    """The fields to change, by dotted path, in a recipe that is to train on shards of images."""
    found = look_at(data)
    fields: dict[str, Any] = {"name": name}
    if recipe.data.kind == "image":
        size, section = size or recipe.data.image_size, "data"
        assert size is not None
        channels = 3 if found.colours else 1
        inside = recipe.autoencoder.latent_shape(channels, size)[0]
        fields |= {"data.shards": data, "data.image_size": size, "data.channels": channels}
        fields |= {"model.in_channels": inside, "model.out_channels": inside}
    else:
        fields |= _encoding(recipe, data, size, found)
        size, section = fields["encode.data.image_size"], "encode.data"
    if found.size != size:
        fields[f"{section}.resize"] = "cover"
    fields |= _classes(recipe, found)
    return {field: value for field, value in fields.items() if value != _value_of(recipe, field)}


def _value_of(recipe: Recipe, field: str) -> Any:
    """What a recipe has in a field of a dotted path; None where a section is null."""
    value: Any = recipe_mapping(recipe)
    for name in field.split("."):
        value = None if value is None else value[name]
    return value


def _encoding(recipe: Recipe, data: str, size: int | None, found: ImagesFound) -> dict[str, Any]:
    """The fields of a recipe whose latents an autoencoder makes from the images beforehand."""
    images = recipe.encode.data
    size = size or (images.image_size if images else None)
    if size is None:
        raise ConfigError(
            "--size", None, f"is needed: {recipe.name} trains on latents, and does not say of which images",
            "Give the pixels a side of the images to encode.",
        )  # fmt: skip
    if recipe.data.context_shape is not None and not found.captions:
        raise DataError(
            "--data", data, f"has no captions, and {recipe.name} makes images from text",
            "Put NAME.txt beside every image and pack again, or start from another recipe.",
        )  # fmt: skip
    fields = {"encode.data.shards": data, "encode.data.image_size": size}
    fields["data.shards"] = f"{data.rstrip('/')}-latents"
    if recipe.autoencoder.kind == "space_to_depth":  # of other kinds, the shape depends on the autoencoder's weights
        shape = recipe.autoencoder.latent_shape(images.channels if images else 3, size)
        fields["data.latent_shape"] = list(shape)
    return fields


def _classes(recipe: Recipe, found: ImagesFound) -> dict[str, Any]:
    """The fields that say how many classes there are. A recipe without classes stays one."""
    if recipe.data.num_classes is None:
        return {}
    if (
        found.num_classes is None
        and isinstance(recipe.model, LDMConfig)
        and recipe.model.class_conditioning == "context"
    ):
        raise DataError(
            "--data", found.shards, f"has no classes, and {recipe.name} takes the class as its context",
            "Sort the images into a folder for each class and pack again, or start from another recipe.",
        )  # fmt: skip
    fields: dict[str, Any] = {"data.num_classes": found.num_classes, "model.num_classes": found.num_classes}
    if recipe.data.kind == "latent":
        fields["encode.data.num_classes"] = found.num_classes
    if recipe.train.condition_dropout and found.num_classes is None and not recipe.model.takes_context:
        fields["train.condition_dropout"] = 0.0
    return fields


def look_at(data: str) -> ImagesFound:
    """Read the first images of some shards, and what `dataset.json` beside them says."""
    shards = find_data(DataConfig(shards=data, image_size=1)).shards[0]
    colours, captions, labels, sizes, looked_at = False, True, False, set(), 0
    try:
        for sample in itertools.islice(itertools.chain.from_iterable(samples(s.path) for s in shards), _LOOKED_AT):
            if BLOCK_FIELD in sample or not (field := next((f for f in IMAGE_FIELDS if f in sample), None)):
                held = ", ".join(sorted(name for name in sample if not name.startswith("__")))
                raise DataError("--data", data, f"holds no images (its samples have: {held})", "Name shards of images.")
            image = read_image(sample[field], ImageReading())
            colours = colours or image.mode != "L"
            captions, labels = captions and "txt" in sample, labels or "cls" in sample
            sizes.add(image.size)
            looked_at += 1
    except (TarError, *UNREADABLE) as e:
        raise DataError("--data", data, f"cannot be read ({e})", "See `msdiff data check`.") from e
    first = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    return ImagesFound(
        shards=data,
        colours=colours,
        size=first[0] if first[0] == first[1] else None,
        captions=captions and looked_at > 0,
        num_classes=_number_of_classes(data, shards) if labels else None,
    )


def _number_of_classes(data: str, shards: Sequence[Shard]) -> int:
    """One more than the largest label: as `dataset.json` says, or else of all samples."""
    file = Path(data) / DATASET_INFO
    if file.is_file():
        try:
            listed = parse_mapping(file.read_bytes())["classes"]
        except (ValueError, KeyError):
            listed = []
        if isinstance(listed, list) and listed:
            return len(listed)
    labels = [sample.get("cls") for shard in shards for sample in samples(shard.path)]
    try:
        return 1 + max(int(label) for label in labels if label is not None)
    except ValueError as e:
        raise DataError("--data", data, f"has a class that is no number ({e})", "Make the shards again.") from e
