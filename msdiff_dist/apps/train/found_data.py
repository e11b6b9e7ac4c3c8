"""What is known of a recipe's data before a sample is read: read once by a command, then passed on to the ranks."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from msdiff_dist.data.access import beside, is_local
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.index import Shard
from msdiff_dist.data.loader import load_index
from msdiff_dist.data.make.manifest import MANIFEST, Manifest, load_manifest
from msdiff_dist.errors import DataError


@dataclass(frozen=True)
class FoundData:
    """The shards of a recipe's data.

    Attributes:
        shards: for each source its shards, with their numbers of samples.
        manifests: the manifests that lie beside shards of latents, by address.
    """

    shards: list[list[Shard]]
    manifests: dict[str, Manifest]


def find_data(config: DataConfig) -> FoundData:
    """Read the indexes and manifests of a recipe's data. Shards that msdiff did not encode have no manifest.

    Raises:
        DataError: shards are missing, differ from their index, or were not encoded to the end.
    """
    shards = load_index(config)
    manifests: dict[str, Manifest] = {}
    addresses = dict.fromkeys(beside(shard.path, MANIFEST) for source in shards for shard in source)
    for address in filter(None, addresses if config.kind == "latent" else ()):
        manifest = load_manifest(address, config.access)
        if manifest:
            manifests[address] = manifest
        elif is_local(address) and (Path(address).parent / ".encode").is_dir():
            folder = str(Path(address).parent)
            raise DataError("data.shards", folder, "was not encoded to its end", "Run `msdiff data encode` again.")
    return FoundData(shards, manifests)


class DataFinder:
    """`find_data` for the recipes of one command, run once for all recipes that name the same shards."""

    def __init__(self) -> None:
        self._found: dict[Hashable, FoundData] = {}

    def __call__(self, config: DataConfig) -> FoundData:
        named = (config.kind, config.mixed, config.access, config.max_bad)
        if named not in self._found:
            self._found[named] = find_data(config)
        return self._found[named]
