"""The targets by name."""

from __future__ import annotations

from ..target import Target
from . import containers, data, pictures, records, settings, tars, weights

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (tars, data, pictures, weights, containers, settings, records)
    for target in module.TARGETS
}
