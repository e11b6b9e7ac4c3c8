"""The manifest of a folder of latents: images and networks they come from, and a checksum of every file.

A manifest is written last. A folder without one was not encoded completely.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from msdiff_dist.config import from_mapping, to_mapping
from msdiff_dist.data.access import DEFAULT_ACCESS, AbsentError, Access, read_bytes
from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.files.digest import sha256_of
from msdiff_dist.files.json_text import parse_mapping

MANIFEST = "manifest.json"
NULL_CONTEXT = "null_context.safetensors"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ManifestFile:
    """A file beside the manifest: its samples, its size in bytes and its SHA-256 in hexadecimal."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class NetworkIdentity:
    """A frozen network.

    Attributes:
        name: where it came from.
        identity: digest of its weights and settings.
    """

    name: str
    identity: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        samples: number of samples in all shards.
        shape: (C, H, W) of a latent.
        dtype: floating type of latents and contexts.
        moments: whether mean and log variance, 2C channels, are stored in place of a sample of the posterior.
        flip: whether the latents of the mirrored images are stored too.
        scale_factor: factor by which training multiplies latents.
        scale_measured: whether it is one over their standard deviation, not the autoencoder's own.
        context_shape: (T, D) of the embedding of a caption; None if captions are not embedded.
        null_context: file with the embedding of the empty caption.
        source: fingerprint of the shards of images.
        left_out: the corrupt shards and samples that were skipped, in words.
        shards: the shards of latents.
        format: version of this file's layout.
    """

    samples: int
    shape: tuple[int, int, int]
    dtype: Literal["float16", "bfloat16", "float32"]
    moments: bool
    flip: bool
    scale_factor: float
    scale_measured: bool
    autoencoder: NetworkIdentity
    text_encoder: NetworkIdentity | None
    context_shape: tuple[int, int] | None
    null_context: ManifestFile | None
    source: tuple[str, ...]
    left_out: tuple[str, ...]
    shards: tuple[ManifestFile, ...]
    format: int = FORMAT

    def dump(self) -> str:
        """As JSON text."""
        return json.dumps(to_mapping(self), indent=1, ensure_ascii=False) + "\n"


def load_manifest(address: str, access: Access = DEFAULT_ACCESS) -> Manifest | None:
    """Read a manifest; None if there is no such file.

    Raises:
        DataError: the file is corrupt or of a newer format.
    """
    try:
        mapping = parse_mapping(read_bytes(address, access))
        if isinstance(mapping.get("format"), int) and mapping["format"] > FORMAT:
            problem = f"is of format {mapping['format']}, newer than {FORMAT}"
            raise DataError("data.shards", address, problem, "Use a newer msdiff_dist.")
        return from_mapping(Manifest, mapping)
    except (AbsentError, FileNotFoundError):
        return None
    except (ValueError, OSError, ConfigError) as e:
        raise DataError("data.shards", address, f"is not a manifest ({e})", "Encode again, or copy it again.") from e


def load_null_context(address: str, manifest: Manifest, access: Access = DEFAULT_ACCESS) -> Tensor:
    """The embedding of the empty caption, [T, D].

    Raises:
        DataError: the file is missing or corrupt.
    """
    assert manifest.null_context is not None
    try:
        content = read_bytes(address, access)
        if hashlib.sha256(content).hexdigest() != manifest.null_context.sha256:
            raise ValueError("its checksum is not the manifest's")
        return load(content)["context"]
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        raise DataError("data.shards", address, f"cannot be used ({e})", "Copy it again, or encode again.") from e


def stored_file(path: Path, samples: int = 0) -> ManifestFile:
    """Describe a file, by reading all of it."""
    return ManifestFile(name=path.name, samples=samples, bytes=path.stat().st_size, sha256=sha256_of(path))
