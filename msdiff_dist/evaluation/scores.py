"""Scores of a set of images against reference images, in the features of one network, with confidence intervals.

torch-fidelity computes KID and the inception score, `prdc` precision, recall, density and coverage. An interval is the
score plus and minus 1.96 standard deviations of its bootstrap: the generated images are drawn anew with replacement,
the reference stays. (The bootstrap's own mean is no estimate: fewer distinct images make most scores worse.)
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.evaluation.frechet import Gaussian, frechet_distance_of
from msdiff_dist.randomness import generator
from msdiff_dist.registry import Table

Array = NDArray[np.float64]
_NEAREST = 5  # neighbours that span a manifold in precision and recall (2002.09797)
_SPLITS = 10  # of the inception score
_SUBSETS, _SUBSET_SIZE = 100, 1000  # of KID, as in torch-fidelity
_DIRECTIONS = 1024  # of MIND
_MOST_NEIGHBOURS = 2000  # images in a bootstrap draw of scores whose cost is the square of their number


@dataclass(frozen=True, kw_only=True)
class ScoredImages:
    """What is known of the generated images.

    Attributes:
        features_ND: features in the chosen space.
        logits_NK: logits of its classes; None if it has none.
        image_text_NE, text_NE: embeddings of unit length by CLIP of the images and of their prompts; None without text.
    """

    features_ND: Array
    logits_NK: Array | None = None
    image_text_NE: Array | None = None
    text_NE: Array | None = None

    def rows(self, chosen_n: NDArray[np.int64]) -> ScoredImages:
        """The images of these numbers."""
        parts = (self.features_ND, self.logits_NK, self.image_text_NE, self.text_NE)
        features_ND, logits_NK, image_text_NE, text_NE = (None if part is None else part[chosen_n] for part in parts)
        assert features_ND is not None
        return ScoredImages(features_ND=features_ND, logits_NK=logits_NK, image_text_NE=image_text_NE, text_NE=text_NE)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The reference images: their mean and covariance, and unless these came from a file alone, their features."""

    gaussian: Gaussian
    features_MD: Array | None = None


@dataclass(frozen=True)
class Score:
    """A value with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


Compute = Callable[[ScoredImages, Reference], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """An entry of `METRICS`.

    Attributes:
        compute: the values by name.
        least: number of images below which the values say little.
        fewest: images, generated and of the reference, without which there is no value.
        higher_is_better: the names of values of which this is true.
        drawn: what the bootstrap computes instead, where `compute` already averages over draws.
        draws: of the bootstrap.
        most: images in a draw. If there are more, the standard deviation is scaled by the root of the draw's share.
        needs: what `compute` needs besides features.
    """

    compute: Compute
    least: int
    fewest: int = 2
    higher_is_better: tuple[str, ...] = ()
    drawn: Compute | None = None
    draws: int = 20
    most: int | None = None
    needs: tuple[str, ...] = ()


def fid(images: ScoredImages, reference: Reference) -> dict[str, float]:
    """Fréchet distance (1706.08500, Eq. 6) of the normal distributions fitted to both sets of features."""
    return {"fid": frechet_distance_of(images.features_ND, reference.gaussian)}


def kid(images: ScoredImages, reference: Reference) -> dict[str, float]:
    """Kernel distance (1801.01401): unbiased MMD^2 with a cubic kernel, mean over 100 subsets of 1,000 images, or of as
    many as the smaller set has."""
    full = min(len(images.features_ND), len(_features(reference))) >= _SUBSET_SIZE
    return _kid(images, reference, _SUBSETS if full else 1)


def _kid_of_one_subset(images: ScoredImages, reference: Reference) -> dict[str, float]:
    return _kid(images, reference, 1)


def _kid(images: ScoredImages, reference: Reference, subsets: int) -> dict[str, float]:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    a, b = torch.from_numpy(images.features_ND), torch.from_numpy(_features(reference))
    size = min(_SUBSET_SIZE, len(a), len(b))
    found = kid_features_to_metric(a, b, kid_subsets=subsets, kid_subset_size=size, verbose=False, rng_seed=2020)
    return {"kid": found[KEY_METRIC_KID_MEAN]}


def prdc(images: ScoredImages, reference: Reference) -> dict[str, float]:
    """Precision, recall (1904.06991), density and coverage (2002.09797) with 5 nearest neighbours."""
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the numbers of images
        found = compute_prdc(_features(reference), images.features_ND, _NEAREST)
    return {name: float(value) for name, value in found.items()}


def inception_score(images: ScoredImages, reference: Reference) -> dict[str, float]:
    """exp E KL(p(class | image) || p(class)) (1606.03498), over 10 splits; the classes are the feature network's."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    assert images.logits_NK is not None
    return {"is": isc_features_to_metric(torch.from_numpy(images.logits_NK), splits=_SPLITS)[KEY_METRIC_ISC_MEAN]}


def mind(images: ScoredImages, reference: Reference) -> dict[str, float]:
    """Sliced squared 2-Wasserstein distance of the features, times their number D (the Monge inception distance,
    2605.06797, is such a distance in the features of Inception).

    It is the mean over 1,024 fixed random directions of the distance of the projections, which sorting gives exactly.
    The factor D makes it |a - b|^2 for two points, as the Fréchet distance is.
    """
    a_ND, b_MD = images.features_ND, _features(reference)
    width = a_ND.shape[1]
    directions_DP = mind_directions(width)
    directions_DP = directions_DP / np.linalg.norm(directions_DP, axis=0)
    quantiles = (np.arange(max(len(a_ND), len(b_MD))) + 0.5) / max(len(a_ND), len(b_MD))
    total = 0.0
    for columns in np.array_split(np.arange(_DIRECTIONS), 16):  # in parts, to hold little memory
        a, b = (_quantiles(x @ directions_DP[:, columns], quantiles) for x in (a_ND, b_MD))
        total += float(((a - b) ** 2).mean(axis=0).sum())
    return {"mind": width * total / _DIRECTIONS}


def mind_directions(width: int) -> Array:
    """The fixed directions of `mind`, [D, P], of any length."""
    return generator(0, "mind directions").standard_normal((width, _DIRECTIONS))


def _quantiles(projected_NP: Array, at_Q: Array) -> Array:
    """Values of the inverse of each column's empirical distribution function, [Q, P]."""
    ordered = np.sort(projected_NP, axis=0)
    values: Array = ordered[np.minimum((at_Q * len(ordered)).astype(int), len(ordered) - 1)]
    return values


def clip(images: ScoredImages, reference: Reference) -> dict[str, float]:
    """CLIP score (2104.08718) of images and prompts, 100 max(cos, 0), and as `retrieval` the share of images whose own
    prompt is the nearest of all."""
    assert images.image_text_NE is not None
    assert images.text_NE is not None
    own_N = (images.image_text_NE * images.text_NE).sum(axis=1)
    distinct_TE, which_N = np.unique(images.text_NE.round(6), axis=0, return_inverse=True)
    nearest_N = (images.image_text_NE @ distinct_TE.T).argmax(axis=1)
    return {"clip": float(100 * own_N.clip(0).mean()), "retrieval": float((nearest_N == which_N.ravel()).mean())}


METRICS: Table[Metric] = Table(
    "metric",
    {
        "fid": Metric(compute=fid, least=10_000),
        "kid": Metric(compute=kid, drawn=_kid_of_one_subset, least=1000, most=_SUBSET_SIZE),
        "prdc": Metric(
            compute=prdc,
            least=1000,
            fewest=_NEAREST + 2,  # as `prdc` sorts them
            higher_is_better=("precision", "recall", "density", "coverage"),
            draws=10,
            most=_MOST_NEIGHBOURS,
        ),
        "is": Metric(
            compute=inception_score, least=5000, fewest=_SPLITS, higher_is_better=("is",), needs=("logits_NK",)
        ),
        "mind": Metric(compute=mind, least=1000),
        "clip": Metric(compute=clip, least=100, higher_is_better=("clip", "retrieval"), needs=("text_NE",)),
    },
)
"""What `msdiff evaluate --metrics` computes from features, by name."""


def score(name: str, images: ScoredImages, reference: Reference, seed: int = 0) -> dict[str, Score]:
    """The values of a metric with their intervals.

    Raises:
        ConfigError: there is no such metric, or the feature space lacks what it needs.
        DataError: the reference has no features, but statistics alone, and the metric needs them.
    """
    metric = METRICS.choose("--metrics", name)
    for need in metric.needs:
        if getattr(images, need) is None:
            what = "classes in the feature space" if need == "logits_NK" else "prompts and the weights of CLIP"
            raise ConfigError("--metrics", name, f"needs {what}", "Leave it out, or choose another --features.")
    count, references = len(images.features_ND), reference.features_MD
    check_enough(name, count, "SUBJECT", count)
    if references is not None:
        check_enough(name, len(references), "--reference", len(references))
    values = metric.compute(images, reference)
    size = min(count, metric.most or count)
    drawn: dict[str, list[float]] = {key: [] for key in values}
    for draw in range(metric.draws):
        chosen = bootstrap_draw(seed, draw, count, size)
        for key, value in (metric.drawn or metric.compute)(images.rows(chosen), reference).items():
            drawn[key].append(value)
    scale = 1.96 * (size / count) ** 0.5
    return {
        key: Score(value, value - scale * float(np.std(drawn[key])), value + scale * float(np.std(drawn[key])))
        for key, value in values.items()
    }


def check_enough(name: str, count: int, option: str, value: object) -> None:
    """Refuse a number of images of which a metric has no value.

    Args:
        option, value: what gives the images, for the message.

    Raises:
        DataError: there are too few.
    """
    fewest = METRICS.choose("--metrics", name).fewest
    if count < fewest:
        problem = f"has too few images for {name}, which needs {fewest}"
        raise DataError(option, value, problem, "Use more images, or other --metrics.")


def bootstrap_draw(seed: int, draw: int, count: int, size: int) -> NDArray[np.int64]:
    """Numbers of the images of one draw of the bootstrap: `size` of `count`, with replacement."""
    return generator(seed, "bootstrap", draw).integers(0, count, size)


def _features(reference: Reference) -> Array:
    if reference.features_MD is None:
        raise DataError(
            "--reference", None, "holds mean and covariance alone, from which only fid can be computed",
            "Name the reference images, or --metrics fid.",
        )  # fmt: skip
    return reference.features_MD
