"""Reference images: their features, computed once and kept in a cache, or statistics from an .npz file.

The cache has one file for each set of images and feature space, named by the digests of both. Each says what it is of.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.errors import DataError
from msdiff_dist.evaluation.feature_spaces import FeatureSpace
from msdiff_dist.evaluation.frechet import Gaussian, fit
from msdiff_dist.evaluation.image_sets import ImageArray, ImageSet
from msdiff_dist.evaluation.scores import Reference
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.files.json_text import parse_mapping

Track = Callable[[Iterable[Tensor]], Iterable[Tensor]]
_NEWEST_FORMAT = 1


@dataclass(frozen=True)
class Features:
    """Features [N, D] of a set of images, logits [N, K] or None, and the shape [C, H, W] of the images."""

    features_ND: np.ndarray
    logits_NK: np.ndarray | None
    image_shape: tuple[int, int, int]


def features_of(images: ImageSet, space: FeatureSpace, option: str, track: Track = iter) -> Features:
    """The features of all images of a set, float64.

    Raises:
        DataError: features are not finite, or what the set's `batches` and the space raise.
    """
    found, shape = [], None
    for batch in track(images.batches()):
        found.append(space(batch))
        shape = (batch.shape[1], batch.shape[2], batch.shape[3])
    if shape is None:
        raise DataError(option, None, "holds no images", "Name a set of images.")
    return joined(found, shape, space, option)


def joined(
    batches: Sequence[tuple[Tensor, Tensor | None]], shape: tuple[int, int, int], space: FeatureSpace, option: str
) -> Features:
    """The features of images of one shape, from those of all their batches, as a space gives them.

    Raises:
        DataError: features are not finite.
    """
    features_ND = torch.cat([features for features, _ in batches]).double().numpy()
    logits = [classes for _, classes in batches if classes is not None]
    if not np.isfinite(features_ND).all():
        first = int((~np.isfinite(features_ND).all(axis=1)).nonzero()[0][0])
        raise DataError(
            option, first, f"the features of this image in {space.name} are not finite", "Check the image and weights."
        )
    return Features(features_ND, torch.cat(logits).double().numpy() if logits else None, shape)


def reference_of(images: ImageSet, space: FeatureSpace, name: str, track: Track = iter) -> tuple[Reference, Features]:
    """The reference that a set of images makes, from the cache if it was computed before.

    Args:
        name: of the set, for the provenance.

    Raises:
        DataError: there are fewer than two images, or what `features_of` raises.
    """
    file = cache_folder() / f"{images.key}-{space.identity}.npz"
    features = _cached(file, space)
    if features is None:
        features = features_of(images, space, "--reference", track)
        about = {"images": name, "key": images.key, "num": len(features.features_ND), **_about(space)}
        file.parent.mkdir(parents=True, exist_ok=True)
        features_ND, shape = features.features_ND.astype(np.float32), np.array(features.image_shape)
        atomic_write(file, lambda f: np.savez(f, about=json.dumps(about), features=features_ND, shape=shape))
    if len(features.features_ND) < 2:
        raise DataError("--reference", name, "has one image, and a covariance needs two", "Name more images.")
    return Reference(gaussian=fit(features.features_ND), features_MD=features.features_ND), features


def cache_folder() -> Path:
    """Where features of reference images are kept: `$XDG_CACHE_HOME/msdiff_dist/features`, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "msdiff_dist" / "features"


def _about(space: FeatureSpace) -> dict[str, object]:
    return {"features": space.name, "identity": space.identity, "weights": space.weights, "format": _NEWEST_FORMAT}


def _cached(file: Path, space: FeatureSpace) -> Features | None:
    if not file.is_file():
        return None
    try:
        with np.load(file) as stored:
            shape = tuple(int(n) for n in stored["shape"])
            features_ND = stored["features"].astype(np.float64)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # cut short by a full disk, say: computed again
        return None
    if features_ND.ndim != 2 or features_ND.shape[1] != space.width or len(shape) != 3:
        return None
    return Features(features_ND, None, (shape[0], shape[1], shape[2]))


def read_npz(path: Path, space: FeatureSpace) -> Reference | ImageArray:
    """A reference from an .npz file: images (`arr_0`, as ADM's), or mean and covariance (`mu`, `sigma`, as EDM's).

    Statistics without images belong to the network that made them. Files of EDM and ADM have Inception's; those that
    `write_npz` wrote say whose they are.

    Raises:
        DataError: the file is neither, or its statistics are of another feature space.
    """

    def refuse(problem: str, remedy: str) -> DataError:
        return DataError("--reference", str(path), problem, remedy)

    try:
        with np.load(path) as stored:
            held = {name: stored[name] for name in ("mu", "sigma", "arr_0", "about") if name in stored}
    except Exception as e:  # of the archive, its compression, or a header that is Python source
        raise refuse(f"is not a readable .npz file ({e})", "Copy it again.") from e
    images = held.get("arr_0")
    if images is not None and images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3):
        return ImageArray(path, images)
    if "mu" not in held or "sigma" not in held:
        raise refuse(
            "holds neither images (arr_0) nor statistics (mu, sigma)", "Name a file of ADM, EDM or this package."
        )
    mean_D, covariance_DD = held["mu"].astype(np.float64), held["sigma"].astype(np.float64)
    try:
        about = parse_mapping(str(held["about"])) if "about" in held else {}
    except ValueError as e:
        raise refuse(f"holds an `about` that {e}", "Make it again.") from None
    made_by = about.get("features", "inception")
    if about.get("identity", space.identity) != space.identity or made_by != space.name:
        whose = f"{made_by} ({about.get('identity', 'of EDM or ADM')})"
        raise refuse(
            f"holds statistics of {whose}, and the features are {space.name} ({space.identity})",
            "Use the same --features, or the reference images.",
        )
    if mean_D.shape != (space.width,) or covariance_DD.shape != (space.width, space.width):
        raise refuse(f"has {list(mean_D.shape)} means, not {space.width}", "Use the --features that it was made with.")
    if not (np.isfinite(mean_D).all() and np.isfinite(covariance_DD).all()):
        raise refuse("holds statistics that are not finite", "Make it again, from images.")
    return Reference(gaussian=Gaussian(mean_D, covariance_DD))


def write_npz(path: Path, reference: Reference, space: FeatureSpace, num: int) -> None:
    """Write statistics as EDM's `fid.py` and ADM's evaluator read them, with the feature space's identity beside."""
    about = json.dumps({"num": num, **_about(space)})
    gaussian = reference.gaussian
    atomic_write(path, lambda f: np.savez(f, mu=gaussian.mean_D, sigma=gaussian.covariance_DD, about=about))
