"""Variants of an ablation that try values of fields, such as learning rates."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from msdiff_dist.errors import ConfigError
from msdiff_dist.files.yaml_places import Places
from msdiff_dist.sweep import change_name

Variants = Mapping[str, Mapping[str, Any]]


def check_grid(variants: Variants, grid: Mapping[str, Mapping[str, list[Any]]]) -> None:
    """Raise ConfigError where `grid` changes a variant that there is not, or lists no values."""
    for name, fields in grid.items():
        if name not in variants:
            raise ConfigError("grid", name, "is not one of the variants", f"Choose from: {', '.join(variants)}.")
        for field, values in fields.items():
            if not values:
                raise ConfigError(f"grid.{name}.{field}", values, "has no values", "List at least one.")


def with_grid(
    variants: Variants, grid: Mapping[str, Mapping[str, list[Any]]], places: Places
) -> dict[str, dict[str, Any]]:
    """The variants, each followed by those that change it: `unified_lr=0.001` is `unified` with `optimizer.lr: 0.001`.

    Args:
        grid: by the name of a variant, dotted recipe fields and the values that each takes; every combination is a
            further variant.
        places: where the ablation file gives its fields; is told where it gives those of the further ones.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, changes in variants.items():
        found[name] = dict(changes)
        fields = grid.get(name, {})
        for values in itertools.product(*fields.values()) if fields else ():
            tried = dict(zip(fields, values, strict=True))
            further = f"{name}_{change_name(tried)}"
            found[further] = {**changes, **tried}
            for field in found[further]:
                given = f"grid.{name}.{field}" if field in tried else f"variants.{name}.{field}"
                places.give(f"variants.{further}.{field}", None, places.of(given))
    return found
