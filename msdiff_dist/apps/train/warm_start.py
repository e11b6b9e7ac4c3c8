"""Training that starts from the weights of an export or a checkpoint (`train.init_from`) instead of random ones."""

from __future__ import annotations

from pathlib import Path

from msdiff_dist.checkpoint.layout import INDEX, complete_checkpoints
from msdiff_dist.config import differences, to_mapping
from msdiff_dist.errors import ConfigError
from msdiff_dist.export.weights import CONFIG, Weights, open_weights
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.recipe import Recipe

_FIELD = "train.init_from"
_FREE = ("attention_backend", "dropout")  # of a model: no weight depends on them


def start_weights(recipe: Recipe, checkpoints: Path) -> Weights | None:
    """What training starts from; None: random weights, or one of the `checkpoints` that are there.

    Raises:
        ConfigError: it is neither an export nor a checkpoint, or another model's. CorruptError: a file of it is.
    """
    path = recipe.train.init_from
    if path is None or complete_checkpoints(checkpoints):
        return None
    if not any((Path(path) / file).is_file() for file in (CONFIG, INDEX)):
        raise ConfigError(_FIELD, path, "is neither an export folder nor a checkpoint", _remedy(Path(path)))
    weights = open_weights(Path(path))
    changed = differences(_architecture(weights.description.model), _architecture(recipe.model))
    if changed:
        named = "; ".join(f"model.{field} is {there!r} there and {here!r} here" for field, there, here in changed)
        raise ConfigError(_FIELD, path, f"holds another model ({named})", "Make the recipe's model that one.")
    return weights


def _architecture(model: ModelConfig) -> dict[str, object]:
    return {field: value for field, value in to_mapping(model).items() if field not in _FREE}


def _remedy(path: Path) -> str:
    trained = complete_checkpoints(path / "checkpoints")
    if trained:  # a run may write another while the ranks of this one start: they are to read the same
        return f"Name one checkpoint of the run; the newest is {trained[-1]}."
    return "Name a folder made by `msdiff export`, `msdiff convert` or `msdiff grow`, or a checkpoint."
