"""`msdiff evaluate`: images of a model, or of a folder, scored against reference images in one feature space."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from msdiff_dist.apps.evaluation.loss import held_out
from msdiff_dist.apps.evaluation.reference_images import check_reference, how_to_read, open_reference, shown
from msdiff_dist.apps.evaluation.sampling import sample_images
from msdiff_dist.apps.evaluation.subject import Subject, open_subject, with_prompts
from msdiff_dist.config import to_mapping
from msdiff_dist.data.config import DataConfig
from msdiff_dist.distributed.environment import this_device
from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.clip_model import DEFAULT_MODEL, ClipModel
from msdiff_dist.evaluation.feature_spaces import FeatureSpace, clip_space, load_feature_space
from msdiff_dist.evaluation.image_sets import ImageFolder
from msdiff_dist.evaluation.reference import Features, features_of, write_npz
from msdiff_dist.evaluation.sampling_job import SamplingJob
from msdiff_dist.evaluation.scores import METRICS, Score, ScoredImages, check_enough, score
from msdiff_dist.export.weights import Weights
from msdiff_dist.files.json_text import parse_mapping
from msdiff_dist.files.work_share import Part

RECORDS = "evaluations.jsonl"
LOSS = "loss"  # the held-out loss: a metric that needs no images


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """The options of `msdiff evaluate`.

    Attributes:
        subject: run, checkpoint, export or folder of images.
        metrics: names in `METRICS`.
        features: name of a feature space, or a classifier's file. feature_weights: file of its weights.
        clip_model: name or configuration of the CLIP model, for the space `clip` and the metric of that name.
        job: the images to sample.
        reference: shards, a folder of images or an .npz file; None: what the run was trained on.
        ema: use the averaged weights.
        samples: folder for the images; None: one of the subject's own.
        nproc: sampling processes on this machine. part: share of the images that this command samples.
        held_out: shards for the metric `loss`; None: what the run held out.
        statistics: file to which the reference's mean and covariance are written.
        during_training: the ranks of the run have put all images into `samples`.
    """

    subject: Path
    job: SamplingJob
    metrics: tuple[str, ...] = ("fid", "kid")
    features: str = "mobilenet"
    feature_weights: Path | None = None
    clip_model: str = DEFAULT_MODEL
    reference: str | None = None
    ema: bool = True
    samples: Path | None = None
    nproc: int = 1
    part: Part = field(default_factory=Part)
    held_out: str | None = None
    statistics: Path | None = None
    during_training: bool = False

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name != LOSS:
                METRICS.choose("--metrics", name)
        if "clip" in self.metrics and self.features != "clip":
            raise ConfigError("--metrics", "clip", "is computed by the network of --features clip", "Add that option.")

    def digest(self) -> str:
        """A digest of what is asked for, whatever the subject and wherever it is computed: `asked` of records."""
        paths = {"feature_weights", "reference", "held_out", "clip_model", "features", "metrics", "ema"}
        asked = {name: str(getattr(self, name)) for name in sorted(paths)} | {"job": to_mapping(self.job)}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores with everything that they depend on.

    Attributes:
        record: as a line of `evaluations.jsonl` has it.
        notes: sentences on what weakens the scores.
        file: the `evaluations.jsonl` that it was added to; None for a folder of images.
    """

    scores: dict[str, Score]
    record: dict[str, Any]
    notes: tuple[str, ...]
    file: Path | None


def evaluate(request: EvaluationRequest) -> Evaluation | None:
    """Sample what is missing, compute features and scores, and add them to the subject's `evaluations.jsonl`.

    Returns None while images of other parts are missing.

    Raises:
        ConfigError, DataError, CheckpointError: what was asked for does not fit together or is missing.
    """
    subject = open_subject(request.subject, request.ema)
    loss = held_out(subject, request.held_out, request.ema) if LOSS in request.metrics else None
    names = [name for name in request.metrics if name != LOSS]
    asked = {"asked": request.digest()}
    if not names:
        assert loss is not None
        return _recorded(subject, loss.scores, asked | {"held_out": loss.about, "notes": []})
    # Before anything is sampled: weights and references that are missing are found now.
    if subject.weights is not None:
        for name in names:
            check_enough(name, request.job.num, "--num", request.job.num)
    space, clip = check_request(request, subject.images)
    reference_images = how_to_read(request.reference, subject.images)
    job, folder = request.job, subject.path
    if subject.weights is not None:
        job = sampled_by(request, subject.weights, reference_images)
        folder = request.samples or subject.sampled_into(job)
        if not request.during_training and not sample_images(
            request.subject, folder, job, request.ema, request.nproc, request.part
        ):
            return None
    elif request.part.of > 1:
        raise ConfigError("--parts", request.part.of, "there is nothing to sample: these are images", "Leave it out.")
    own = ImageFolder(folder, "SUBJECT", job.num if subject.weights is not None else None)
    features = features_of(own, space, "SUBJECT", shown("features of the images"))
    reference, about_reference = open_reference(request.reference, reference_images, features.image_shape).of(space)
    images = ScoredImages(features_ND=features.features_ND, logits_NK=features.logits_NK, **_text(clip, job, features))
    scores = {key: found for name in names for key, found in score(name, images, reference, job.seed).items()}
    if request.statistics is not None:
        write_npz(request.statistics, reference, space, about_reference["num"] or 0)
    num = len(features.features_ND)
    notes = list(_notes(names, num, space))
    about = asked | {
        "features": {"name": space.name, "digest": space.identity, "weights": space.weights},
        "num": num,
        "image_shape": list(features.image_shape),
        "seed": job.seed if subject.weights is not None else None,
        "sampler": to_mapping(job.sampler) if subject.weights is not None else None,
        "reference": about_reference,
        "notes": notes,
    }
    if request.during_training:
        about["during_training"] = True
    if loss is not None:
        scores, about = scores | loss.scores, about | {"held_out": loss.about}
    return _recorded(subject, scores, about)


def _recorded(subject: Subject, scores: dict[str, Score], about: dict[str, Any]) -> Evaluation:
    """The evaluation, added to the subject's `evaluations.jsonl`."""
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **subject.described(),
        "metrics": {key: found.value for key, found in scores.items()},
        "intervals": {key: [found.low, found.high] for key, found in scores.items()},
        **about,
        "versions": _versions(),
    }
    file = subject.home / RECORDS if subject.weights is not None else None
    if file is not None:
        with file.open("a") as lines:  # one write of one line: several commands at once do not mix theirs
            lines.write(json.dumps(record) + "\n")
    return Evaluation(scores=scores, record=record, notes=tuple(about["notes"]), file=file)


def _space(request: EvaluationRequest) -> tuple[FeatureSpace, ClipModel | None]:
    device = this_device()
    if request.features != "clip":
        return load_feature_space(request.features, request.feature_weights, device), None
    clip = ClipModel(request.feature_weights, request.clip_model, device)
    return clip_space(clip, request.feature_weights), clip


def check_request(request: EvaluationRequest, trained_on: DataConfig | None) -> tuple[FeatureSpace, ClipModel | None]:
    """The feature space of a request, for which weights and reference are there.

    Args:
        trained_on: the images that the subject's model was trained on; None where unknown.

    Raises:
        ConfigError, DataError: something is missing, or the reference is of another feature space.
    """
    space, clip = _space(request)
    check_reference(request.reference, how_to_read(request.reference, trained_on), space)
    return space, clip


def sampled_by(request: EvaluationRequest, weights: Weights, images: DataConfig | None) -> SamplingJob:
    """The job by which images of these weights are sampled, with its prompts and its solver."""
    return with_prompts(request.job, weights, images).resolved(weights.description.process())


def is_recorded(run: Path, step: int, asked: str, sha256: str | None = None) -> bool:
    """Whether a run has an evaluation of a step in which the same was asked for.

    Args:
        sha256: identity of the weights; None: of any.
    """
    file = run / RECORDS
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            record = parse_mapping(line)
        except ValueError:  # torn by a kill, or edited: no record of anything
            continue
        if (record.get("step"), record.get("asked")) == (step, asked) and sha256 in (None, record.get("sha256")):
            return True
    return False


def _text(clip: ClipModel | None, job: SamplingJob, features: Features) -> dict[str, Any]:
    """Embeddings of the images and of their prompts, for scores of text."""
    if clip is None or not job.prompts:
        return {}
    prompts = [job.prompts[i % len(job.prompts)] for i in range(len(features.features_ND))]
    return {"image_text_NE": features.features_ND, "text_NE": np.asarray(clip.text(prompts))}


def _notes(metrics: Iterable[str], num: int, space: FeatureSpace) -> Iterable[str]:
    for name in metrics:
        if num < METRICS[name].least:
            yield f"{name} of {num} images says little: {METRICS[name].least} or more are usual"
    if "fid" in metrics and num <= space.width:
        yield (
            f"fid of {num} images in {space.width} features is biased upwards: their covariance has not full rank. It "
            "compares with scores of the same number only; kid is not biased"
        )


def _versions() -> dict[str, str]:
    found = {}
    for package in ("msdiff-dist", "torch", "torchvision", "torch-fidelity", "prdc"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
