"""The recipe section `evaluation`: scores of images while a run trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from msdiff_dist.bounds import check_between, check_different, check_seed
from msdiff_dist.diffusion.solvers import SamplerConfig
from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.clip_model import DEFAULT_MODEL
from msdiff_dist.evaluation.sampling_job import MOST_IMAGES
from msdiff_dist.evaluation.scores import METRICS

_LONGEST_S = 1e6


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Scores of images of the averaged weights. The ranks sample between steps; a process beside them on rank 0's
    machine, on its CPU and at low priority, computes features and scores."""

    every: int = 0
    """Steps between evaluations; there is one after the last step as well. 0: none. One that is due while another is
    under way is skipped."""
    num: int = 1000
    """Images that are sampled. Scores of different numbers do not compare."""
    pause_seconds: float = 10.0
    """Longest time that training waits after a step. Sampling goes on after the next steps, with the averages of the
    step that is evaluated, until all images are there. A pause has at least one evaluation of the network, or the
    loading of one part of the model."""
    metrics: tuple[Annotated[str, METRICS], ...] = ("fid", "kid")
    """Scores, as `msdiff evaluate --metrics` names them."""
    features: str = "mobilenet"
    """Feature space, or a classifier's file, as `msdiff evaluate --features` names them."""
    feature_weights: str | None = None
    """File of the feature space's weights; null: those that are installed."""
    clip_model: str = DEFAULT_MODEL
    """open_clip model of the feature space `clip`."""
    reference: str | None = None
    """Shards, folder of images or .npz file to compare with; null: the images that are trained on."""
    batch_size: int = 16
    """Images that a rank samples at once, beside the training state and the model's averages in its memory. An image's
    last bits depend on it."""
    seed: int = 0
    """Seed of the images."""
    prompts: tuple[str, ...] = ()
    """Prompts for a model that takes text: image i has prompt i modulo their number; none: the captions of the first
    reference images."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the images are sampled."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError("every", self.every, "must not be negative", "Use 0 for no evaluations.")
        check_between("num", self.num, 2, MOST_IMAGES)
        check_between("batch_size", self.batch_size, 1, MOST_IMAGES)
        check_seed("seed", self.seed)
        if not self.pause_seconds > 0:
            raise ConfigError("pause_seconds", self.pause_seconds, "must be above 0", "Use 10.")
        check_between("pause_seconds", self.pause_seconds, 0, _LONGEST_S)
        check_different("metrics", self.metrics)
        if not self.metrics:
            raise ConfigError("metrics", [], "names no score", "Use [fid], or every: 0 for no evaluations.")
        for name in self.metrics:
            if self.num < METRICS[name].fewest:
                problem = f"has too few images for {name}, which needs {METRICS[name].fewest}"
                raise ConfigError("num", self.num, problem, "Use more images, or other metrics.")
        if "clip" in self.metrics and self.features != "clip":
            problem = "clip is computed by the network of the feature space clip"
            raise ConfigError("metrics", list(self.metrics), problem, "Set features to clip, or leave it out.")
        for name in ("features", "feature_weights", "clip_model", "reference"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ConfigError(name, value, "is empty", "Leave it out.")
