"""Scores images made by one run's network inside an interval of time and by another's elsewhere.

This is the experiment of 2312.09181, Figure 2: it shows in which times a network is better than the reference.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdiff_dist.config import differences, to_mapping
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.loader import load_index
from msdiff_dist.diffusion.config import StagesConfig
from msdiff_dist.diffusion.stage_partition import build_partition
from msdiff_dist.distributed.environment import this_device
from msdiff_dist.errors import ConfigError, RunFolderError
from msdiff_dist.evaluation.feature_spaces import FeatureSpace
from msdiff_dist.evaluation.frechet import frechet_distance_of
from msdiff_dist.evaluation.generate import ImageGenerator, SplicedGenerator
from msdiff_dist.evaluation.image_sets import ShardImages
from msdiff_dist.evaluation.reference import joined, reference_of
from msdiff_dist.evaluation.sampling_job import SamplingJob
from msdiff_dist.evaluation.scores import Reference
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.export.weights import open_weights
from msdiff_dist.files.atomic import atomic_folder, is_free, writing
from msdiff_dist.terminal import LongWork


@dataclass(frozen=True)
class IntervalScore:
    """Score of images made by the run's network at times in [lo, hi) and by the reference's elsewhere."""

    lo: float
    hi: float
    score: float


@dataclass(frozen=True, kw_only=True)
class IntervalReport:
    """Scores of a run, of a reference, and of both spliced at each interval.

    Attributes:
        unit: unit of the intervals' edges, that of the process's time.
        reference: score of the reference's network at all times.
        run: score of the run's network at all times.
    """

    unit: str
    reference: float
    run: float
    intervals: tuple[IntervalScore, ...]


class DistanceOfImages:
    """The Fréchet distance of a generator's images to those of shards, in one feature space.

    Args:
        shards: of the images to compare with; their features are computed once, or come from the cache.
        job: the images to generate.

    Raises:
        DataError: there are no such shards.
    """

    def __init__(self, space: FeatureSpace, shards: str, job: SamplingJob) -> None:
        self.job, self._space, self._shards = job, space, shards
        self._reference: Reference | None = None
        load_index(self._data((1, 1, 1)))

    def __call__(self, generator: ImageGenerator, what: str) -> float:
        """The distance of the images of the job.

        Args:
            what: is done, in words, for the progress that is shown.

        Raises:
            DataError: the shards have images of another shape.
        """
        found, shape = [], (1, 1, 1)
        with LongWork(what, self.job.num, "images") as work:
            for index_n in self.job.batches:
                images = self.job.draw(generator, index_n, work)
                shape = (images.shape[1], images.shape[2], images.shape[3])
                found.append(self._space(images))
        if self._reference is None:
            self._reference, _ = reference_of(ShardImages(self._data(shape)), self._space, self._shards)
        return frechet_distance_of(joined(found, shape, self._space, "RUN").features_ND, self._reference.gaussian)

    def _data(self, shape: tuple[int, int, int]) -> DataConfig:
        return DataConfig(shards=self._shards, channels=3 if shape[0] == 3 else 1, image_size=shape[1])


def interval_report(
    run: Path, reference: Path, boundaries: Sequence[float] | None, distance: DistanceOfImages, out: Path
) -> IntervalReport:
    """Score each interval, and write intervals.csv, intervals.md and intervals.png into the new folder `out`.

    Args:
        boundaries: inner edges of the intervals, in the process's unit; None: the boundaries of the stages of `run`.

    Raises:
        ConfigError: the runs differ in process, latents or conditions, or an edge lies outside the process.
        CheckpointError, DataError: weights or reference images are missing.
        RunFolderError: `out` is not empty.
    """
    if not is_free(out):
        raise RunFolderError("--out", str(out), "is not empty", "Name a new folder.")
    weights, others = open_weights(run), open_weights(reference)
    about = weights.description
    _check_alike(about, others.description, reference)
    process, partition = about.process(), about.partition()
    if boundaries is not None:
        try:
            partition = build_partition(StagesConfig(boundaries=tuple(boundaries)), process)
        except ConfigError as e:
            raise ConfigError("--intervals", e.value, e.problem, e.remedy) from None
    distance.job.sampler.for_process(process)
    device = this_device()
    inside, outside = ImageGenerator(weights, device), ImageGenerator(others, device)

    edges = [partition.interval(k) for k in range(partition.num_stages)]
    number = itertools.count(1)

    def scored(generator: ImageGenerator) -> float:
        return distance(generator, f"score {next(number)} of {len(edges) + 2}: sampling")

    scores = tuple(IntervalScore(lo, hi, scored(SplicedGenerator(inside, outside, lo, hi))) for lo, hi in edges)
    report = IntervalReport(unit=process.unit, reference=scored(outside), run=scored(inside), intervals=scores)
    with writing("--out", out, RunFolderError), atomic_folder(out) as aside:
        (aside / "intervals.csv").write_text(_csv(report))
        (aside / "intervals.md").write_text(markdown(report))
        _plot(report, aside / "intervals.png")
    return report


def markdown(report: IntervalReport) -> str:
    """The report as a Markdown table, with each score's difference from the reference."""
    rows = [f"| {name} | {score:.3f} | {score - report.reference:+.3f} |\n" for name, score in _rows(report)]
    return f"| run's network for {report.unit} in | score | against the reference |\n|---|---|---|\n{''.join(rows)}"


def _rows(report: IntervalReport) -> list[tuple[str, float]]:
    """(where the run's network is used, score): nowhere, in each interval, everywhere."""
    pieces = [(f"[{piece.lo:g}, {piece.hi:g})", piece.score) for piece in report.intervals]
    return [("nowhere", report.reference), *pieces, ("everywhere", report.run)]


def _csv(report: IntervalReport) -> str:
    # Each row says where the run's network is used. The first is nowhere, the last at all times.
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["lo", "hi", "score"])
    writer.writerows([["", "", report.reference], *((p.lo, p.hi, p.score) for p in report.intervals)])
    lo, hi = report.intervals[0].lo, report.intervals[-1].hi
    writer.writerow([lo, hi, report.run])
    return text.getvalue()


def _plot(report: IntervalReport, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    names, scores = zip(*_rows(report), strict=True)
    axes.bar(names, scores)
    axes.axhline(report.reference, color="black", linestyle="--")
    axes.set_xlabel(f"where the run's network stands in for the reference's ({report.unit})")
    axes.set_ylabel("Fréchet distance")
    figure.savefig(path)


def _check_alike(a: ModelDescription, b: ModelDescription, reference: Path) -> None:
    for name, mine, other in differences(_settings(a), _settings(b)):
        problem = f"has {name} = {other!r}, but the run has {mine!r}"
        raise ConfigError("--reference", str(reference), problem, "Name a run that differs only in its network.")


def _settings(about: ModelDescription) -> dict[str, Any]:
    """The settings that must be equal for one network to replace the other, under the recipe's names."""
    process = about.diffusion.process
    return {
        "diffusion": {"process": process, process: to_mapping(about.diffusion.settings())},
        "stages": {"boundaries": about.stages.boundaries, "objectives": to_mapping(about.stages.objectives)}
        if about.stages.objectives
        else None,
        "latent_shape": list(about.latent_shape),
        "autoencoder": to_mapping(about.autoencoder),
        "model": {"num_classes": about.model.num_classes},
        "context_shape": about.context_shape,
    }
