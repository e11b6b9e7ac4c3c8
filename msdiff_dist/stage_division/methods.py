"""The four methods of dividing time into stages, each giving a `Division`, and the plot of what it is based on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.bounds import check_between, check_seed
from msdiff_dist.diffusion.clock import clock_grid, clock_times
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.processes.vp import VPProcess
from msdiff_dist.errors import ConfigError
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.pixels import centred, unit
from msdiff_dist.stage_division.image_blocks import BlockSource, DataBlocks
from msdiff_dist.stage_division.intervals import (
    Lengths,
    affinity_boundaries,
    snr_boundaries,
    timestep_boundaries,
)
from msdiff_dist.stage_division.optimal_denoiser import (
    Blocks,
    LastLimit,
    LimitSimilarities,
    draw_samples,
    limit_boundaries,
    limit_similarities,
    pairwise_boundaries,
    pairwise_similarity,
    running_means,
)

Method = Literal["timestep", "snr", "gradient", "optimal-denoiser"]
ValueRange = Literal["01", "11"]

ALGORITHM_1 = 3
"""Stages that the paper's Algorithm 1 finds; any other number is cut from a matrix of similarities."""
PAIR_GRID = 21
"""Times, evenly spaced on the clock, between which `pairwise_similarity` compares denoisers."""


@dataclass(frozen=True, kw_only=True)
class DenoiserOptions:
    """Settings of the method `optimal-denoiser`. Defaults of eta and last_limit are the paper's published scripts'.

    Args:
        eta: two entries of noise estimates are alike if they differ by at most this.
        alpha: mean similarity that the first and the last of three stages must reach (2312.09181, Eqs. 6 and 7).
        samples: number of noisy samples at which the optimal denoiser is computed.
        value_range: range to which pixels are scaled, [0, 1] or [-1, 1]. Latents stay as they are stored.
        last_limit: see `limit_similarities`.
        seed: seed of the drawn samples, noises and times.
    """

    eta: float = 2 / 256
    alpha: float = 0.9
    samples: int = 2000
    value_range: ValueRange = "01"
    last_limit: LastLimit = "at-t"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ConfigError("--eta", self.eta, "must be positive", "The paper uses 2/256 = 0.0078125.")
        if not 0 < self.alpha <= 1:
            raise ConfigError("--alpha", self.alpha, "must lie in (0, 1]", "Use 0.9.")
        if self.samples < 10:
            raise ConfigError("--samples", self.samples, "must be at least 10", "Use 2000.")
        check_between("--samples", self.samples, 10, 10**7)
        check_seed("--seed", self.seed)


@dataclass(frozen=True, kw_only=True)
class Division:
    """Boundaries of stages, how they were found, and what to plot.

    Attributes:
        boundaries: the K - 1 boundaries in the process's unit.
        found_by: the data and settings, in words.
        limits: similarities to the limits of time, of the optimal denoiser in three stages.
        matrix_GG: similarity or affinity between times, of the other methods that use data.
        process_name: name in the recipe, where a recipe or the command line chose the process.
    """

    method: Method
    process: Process
    stages: int
    boundaries: list[float]
    found_by: str = ""
    limits: LimitSimilarities | None = None
    matrix_GG: np.ndarray | None = field(default=None, repr=False)
    process_name: str | None = None


def divide_by_schedule(process: Process, method: Literal["timestep", "snr"], stages: int, lengths: Lengths) -> Division:
    """Stages that need no data: of equal length, or of similar signal-to-noise ratio."""
    found = (timestep_boundaries if method == "timestep" else snr_boundaries)(process, stages, lengths)
    return Division(method=method, process=process, stages=stages, boundaries=rounded(found))


def divide_by_affinity(process: Process, affinity_GG: np.ndarray, stages: int, lengths: Lengths) -> Division:
    """Stages of similar gradients, from their cosine similarities at the times of `clock_grid`."""
    grid = clock_grid(process, len(affinity_GG))
    found = rounded(affinity_boundaries(grid, affinity_GG, stages, lengths))
    return Division(
        method="gradient",
        process=process,
        stages=stages,
        boundaries=found,
        found_by=f"a grid of {len(grid)} times",
        matrix_GG=affinity_GG,
    )


def divide_by_optimal_denoiser(
    process: Process, blocks: Blocks, count: int, stages: int, options: DenoiserOptions, lengths: Lengths
) -> Division:
    """Stages of similar optimal denoisers: Algorithm 1 for three stages, else the best cut of the similarity matrix.

    Args:
        blocks: the data.
        count: its number of samples.
        options: the matrix takes `samples` / 21 draws, at 21 times each.
        lengths: of the stages cut from the matrix. Algorithm 1 has none to choose.

    Raises:
        ConfigError: the data has no such stages with these options. DataError: there is too little data.
    """
    about = f"{count} samples, {options.samples} draws, eta {options.eta:g}"
    if stages == ALGORITHM_1:
        draws = draw_samples(blocks, count, options.samples, options.seed)
        limits = limit_similarities(process, blocks, draws, options.eta, options.seed, options.last_limit)
        found = rounded(limit_boundaries(process, limits, options.alpha))
        return Division(
            method="optimal-denoiser",
            process=process,
            stages=stages,
            boundaries=found,
            found_by=f"{about}, alpha {options.alpha:g}, limit of the last stage {options.last_limit}",
            limits=limits,
        )
    if not 1 <= stages <= PAIR_GRID:
        raise ConfigError(
            "--stages", stages, f"a grid of {PAIR_GRID} times has 1 to {PAIR_GRID}", "Ask for fewer stages."
        )
    draws = draw_samples(blocks, count, max(1, options.samples // PAIR_GRID), options.seed)
    sigmas = process.sigma_of(clock_times(process, np.linspace(0, 1, PAIR_GRID)))
    matrix = pairwise_similarity(blocks, draws, sigmas, options.eta)
    found = rounded(pairwise_boundaries(process, matrix, stages, lengths))
    return Division(
        method="optimal-denoiser", process=process, stages=stages, boundaries=found, found_by=about, matrix_GG=matrix
    )


def float_blocks(
    sources: list[BlockSource],
    value_range: ValueRange,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Blocks:
    """A data set as float64 blocks on a device.

    Args:
        rank, world_size: the share of the data, see `DataBlocks`.
        track: wraps each pass over the blocks, to show progress.
    """
    data = DataBlocks(sources, rank, world_size)

    def blocks() -> Iterator[tuple[int, Tensor]]:
        for first, rows in track(data):
            values = torch.tensor(rows).to(device).double()
            if rows.dtype == np.uint8:
                values = unit(values) if value_range == "01" else centred(values)
            yield first, values

    return blocks


def rounded(boundaries: list[float]) -> list[float]:
    """Boundaries to four decimals, as the paper prints them; timesteps stay whole numbers."""
    return [b if isinstance(b, int) else round(b, 4) for b in boundaries]


def plot(division: Division, path: Path) -> None:
    """Plot the curves or the matrix that a division is based on, with its boundaries, over the clock.

    Raises:
        ConfigError: matplotlib does not write files of this kind.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 if division.matrix_GG is None else 5.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    process = division.process
    clock = np.linspace(0, 1, 2001)
    # Boundaries are in the process's unit: find their clock times by interpolation.
    at = np.interp(division.boundaries, clock_times(process, clock), clock)
    if division.matrix_GG is not None:
        # The image reaches half a cell beyond the first and the last time, so that cells are centred on their times.
        edge = 0.5 / (len(division.matrix_GG) - 1)
        image = axes.imshow(division.matrix_GG, origin="lower", extent=(-edge, 1 + edge, -edge, 1 + edge))
        figure.colorbar(image, label="similarity")
        axes.set_ylabel("t")
        for u in at:
            axes.axhline(u, color="white", linestyle="--")
            axes.axvline(u, color="white", linestyle="--")
    else:
        _plot_curves(axes, division)
        for u, b in zip(at, division.boundaries, strict=True):
            axes.axvline(u, color="black", linestyle="--", label=f"{process.unit} = {b:g}")
        axes.legend()
    axes.set_xlabel("t" if isinstance(process, VPProcess) else f"t (boundaries in {process.unit})")
    axes.set_title(f"{division.method}, {division.stages} stages")
    try:
        atomic_write(path, lambda f: figure.savefig(f, format=path.suffix[1:] or "png"))
    except ValueError as e:
        raise ConfigError("--plot", str(path), " ".join(str(e).split()), "Name a .png or .pdf file.") from None


def _plot_curves(axes: Any, division: Division) -> None:
    """The similarities to both limits of time with their running means, or log-SNR where no data was used."""
    if division.limits is None:
        u = np.linspace(1e-3, 1, 1000)
        axes.plot(u, -2 * np.log(division.process.sigma_of(clock_times(division.process, u))))
        axes.set_ylabel("log SNR")
        return
    u, means = division.limits.clock_M, running_means(division.limits)
    kinds = (
        (division.limits.to_data_M, means[0], "0", "[0, t)"),
        (division.limits.to_noise_M, means[1], "1", "[t, 1]"),
    )
    for color, (similarity, mean, limit, where) in zip(("tab:blue", "tab:orange"), kinds, strict=True):
        axes.plot(u, similarity, ".", color=color, markersize=2, alpha=0.3)
        axes.plot(u, mean, color=color, label=f"mean similarity to t = {limit} over {where}")
    axes.set_ylabel("similarity")
