"""Training that starts from the weights of an export or a checkpoint (`train.init_from`) instead of random ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msdiff_dist.checkpoint.layout import INDEX, complete_checkpoints
from msdiff_dist.config import differences, to_mapping
from msdiff_dist.errors import ConfigError
from msdiff_dist.export.weights import CONFIG, Weights, open_weights
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.recipe import Recipe

_FIELD = "train.init_from"
_FREE = ("attention_backend", "dropout")  # fields of a model on which no weight depends


def start_weights(recipe: Recipe, checkpoints: Path) -> Weights | None:
    """The weights of `train.init_from`; None without that field, or if there are `checkpoints` to resume from.

    Raises:
        ConfigError: the path is neither an export nor a checkpoint, or holds another model.
        CorruptError: one of its files is corrupt.
    """
    path = recipe.train.init_from
    if path is None or complete_checkpoints(checkpoints):
        return None
    if not any((Path(path) / file).is_file() for file in (CONFIG, INDEX)):
        raise ConfigError(_FIELD, path, "is neither an export folder nor a checkpoint", _remedy(Path(path)))
    weights = open_weights(Path(path))
    changed = differences(architecture(weights.description.model), architecture(recipe.model))
    if changed:
        named = "; ".join(f"model.{field} is {there!r} there and {here!r} here" for field, there, here in changed)
        raise ConfigError(_FIELD, path, f"holds another model ({named})", "Make the recipe's model that one.")
    return weights


def architecture(model: ModelConfig) -> dict[str, object]:
    """The fields of a model on which its weights depend, as plain data."""
    return _without_free(to_mapping(model))


def _without_free(section: Mapping[str, Any]) -> dict[str, object]:
    """A section `model`, and those of its networks, without the fields on which no weight depends."""
    found = {field: value for field, value in section.items() if field not in _FREE}
    networks = enumerate(found.pop("networks", ()))
    return found | {f"networks[{k}]": _without_free(network) for k, network in networks}


def _remedy(path: Path) -> str:
    trained = complete_checkpoints(path / "checkpoints")
    # A run folder is refused: that run may write a checkpoint while the ranks of this one start, and they would read
    # different ones.
    if trained:
        return f"Name one checkpoint of the run; the newest is {trained[-1]}."
    return "Name a folder made by `msdiff export`, `msdiff convert` or `msdiff grow`, or a checkpoint."
