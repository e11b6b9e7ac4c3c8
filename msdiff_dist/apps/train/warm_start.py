"""Training that starts from an export's weights (`train.init_from`) instead of random ones."""

from __future__ import annotations

from pathlib import Path

from msdiff_dist.checkpoint.layout import complete_checkpoints
from msdiff_dist.config import differences, to_mapping
from msdiff_dist.errors import ConfigError
from msdiff_dist.export.weights import CONFIG, ExportWeights
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.recipe import Recipe

_FIELD = "train.init_from"
_FREE = ("attention_backend", "dropout")  # of a model: no weight depends on them


def start_weights(recipe: Recipe, checkpoints: Path) -> ExportWeights | None:
    """What training starts from; None: random weights, or one of the `checkpoints` that are there.

    Raises:
        ConfigError: it is no export, or another model's. DamagedError: a file of it is.
    """
    path = recipe.train.init_from
    if path is None or complete_checkpoints(checkpoints):
        return None
    if not (Path(path) / CONFIG).exists():
        remedy = "Name a folder made by `msdiff export`, `msdiff convert` or tools/init_from_unified.py."
        raise ConfigError(_FIELD, path, "is no export folder", remedy)
    weights = ExportWeights(Path(path))
    changed = differences(_architecture(weights.description.model), _architecture(recipe.model))
    if changed:
        named = "; ".join(f"model.{field} is {there!r} there and {here!r} here" for field, there, here in changed)
        raise ConfigError(_FIELD, path, f"holds another model ({named})", "Make the recipe's model that of the export.")
    return weights


def _architecture(model: ModelConfig) -> dict[str, object]:
    return {field: value for field, value in to_mapping(model).items() if field not in _FREE}
