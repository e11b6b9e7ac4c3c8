"""`msdiff stages cluster`: from its options to a process and data, to boundaries, to a recipe with the boundaries."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from msdiff_dist.bounds import check_between
from msdiff_dist.checkpoint.layout import CheckpointIndex, find_checkpoint
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.config import from_mapping
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.diffusion.clock import clock_grid
from msdiff_dist.diffusion.config import DiffusionConfig, build_process
from msdiff_dist.diffusion.objective import Objective
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.processes import PROCESSES
from msdiff_dist.distributed.environment import is_rank_process, process_group, this_device
from msdiff_dist.distributed.heartbeat import WaitLimits
from msdiff_dist.errors import ConfigError
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.models.autoencoder import LatentCodec
from msdiff_dist.models.multistage_unet import build_parts
from msdiff_dist.randomness import noise
from msdiff_dist.recipe import load_recipe, recipe_from, stored_recipe
from msdiff_dist.stage_division.gradient_affinity import gradient_affinity
from msdiff_dist.stage_division.image_blocks import BlockSource, image_sources, shard_sources
from msdiff_dist.stage_division.intervals import Lengths
from msdiff_dist.stage_division.methods import (
    ALGORITHM_1,
    DenoiserOptions,
    Division,
    Method,
    divide_by_affinity,
    divide_by_optimal_denoiser,
    divide_by_schedule,
    float_blocks,
    plot,
)
from msdiff_dist.terminal import LongWork, track

GRADIENT_GRID, GRADIENT_BATCH = 100, 64
_WAIT_S = 1800.0  # seconds that a rank may wait for the others, which read shares of different sizes
_PLOTS = (".png", ".pdf", ".svg")
_COMMENT = "# boundaries found by: "
# The field in any form YAML allows: a list in brackets, also over several lines, or one item a line after dashes.
_BOUNDARIES = re.compile(r"boundaries:[ \t]*(?:\[[^\]]*\]|(?:\n[ \t]*-[^\n]*)+)")


@dataclass(frozen=True, kw_only=True)
class ClusterRequest:
    """What to divide and how: the options of `msdiff stages cluster` under their names.

    process: its name; None: the recipe's to write to, or else vp. fields: `key=value` changes to the process's section.
    data: shards. images: a folder or an IDX file. run: the run folder whose gradients are compared. options: of the
    optimal denoiser; its seed is also that of gradients. lengths: of the stages. plot, write: files. command: the
    command line, for the comment on the boundaries in a recipe.
    """

    method: Method
    stages: int
    process: str | None = None
    fields: Sequence[str] = ()
    data: str | None = None
    images: Path | None = None
    run: Path | None = None
    options: DenoiserOptions = field(default_factory=DenoiserOptions)
    lengths: Lengths = field(default_factory=Lengths)
    plot: Path | None = None
    write: Path | None = None
    command: str = ""


def cluster(request: ClusterRequest) -> Division | None:
    """Find the boundaries, plot them and write them into a recipe, as requested.

    Under torchrun or srun it is collective, and returns None on every rank but 0.

    Raises:
        ConfigError, DataError, CheckpointError: options contradict each other, the data cannot be read, or there are no
            such boundaries.
    """
    check_request(request)
    if request.method == "gradient":
        division, name = _divide_gradients(request)
    else:
        diffusion = _diffusion(request)
        process, name = build_process(diffusion), diffusion.process
        if request.method == "optimal-denoiser":
            division, is_first = _divide_data(process, _sources(request), request)
            if not is_first:
                return None
        else:
            division = divide_by_schedule(process, request.method, request.stages, request.lengths)
    division = replace(division, process_name=name)
    if request.plot:
        plot(division, request.plot)
    if request.write:
        how = f"{request.command} ({division.found_by})" if division.found_by else request.command
        write_boundaries(request.write, division.boundaries, how)
    return division


def check_request(request: ClusterRequest) -> None:
    """Refuse options that contradict each other, and data, runs and recipes that are not there.

    Raises:
        ConfigError, DataError, CheckpointError: naming the option.
    """
    check_between("--stages", request.stages, 1, 1000)
    check_plot(request.plot)
    if request.write is not None and not request.write.is_file():
        raise ConfigError("--write", str(request.write), "no such file", "Name a recipe.")
    if request.process == "ldm":
        raise ConfigError("--process", "ldm", "recipes call this process discrete", "Use --process discrete.")
    if request.process is not None:
        PROCESSES.choose("--process", request.process)
    options = {"data": ("optimal-denoiser",), "images": ("optimal-denoiser",), "run": ("gradient",)}
    for name, methods in options.items():
        value = getattr(request, name)
        if value is not None and request.method not in methods:
            problem = f"has no meaning for --method {request.method}"
            raise ConfigError(f"--{name}", str(value), problem, f"Remove it, or use --method {methods[0]}.")
    if request.method == "optimal-denoiser" and request.stages == ALGORITHM_1 and request.lengths.limited:
        value = [request.lengths.min, request.lengths.max]
        problem = f"the paper's Algorithm 1, which finds {ALGORITHM_1} stages, has no lengths to choose"
        raise ConfigError("--min-length, --max-length", value, problem, "Leave them out, or use another --alpha.")
    if request.method == "gradient" and request.run is None:
        raise ConfigError("--run", None, "gradients are those of a trained model", "Name a run folder.")
    if request.method == "gradient" and (request.process or request.fields):
        value = request.process or list(request.fields)
        raise ConfigError("--process", value, "gradients are those of the run's own process", "Remove it.")
    if request.method == "optimal-denoiser" and (request.images is None) == (request.data is None):
        problem = "there can be only one data set" if request.data else "the optimal denoiser is one of a data set"
        raise ConfigError("--data", request.data, problem, "Give either --data SHARDS or --images FOLDER_OR_IDX.")
    if request.method == "gradient":
        assert request.run is not None
        find_checkpoint(request.run)
    else:
        _diffusion(request)
    if request.method == "optimal-denoiser":
        _sources(request)


def check_plot(path: Path | None) -> None:
    """Refuse a name that no picture has.

    Raises:
        ConfigError: naming the option.
    """
    if path is not None and path.suffix not in _PLOTS:
        problem = "is not the name of a picture"
        raise ConfigError("--plot", str(path), problem, f"End it in {' or '.join(_PLOTS)}.")


def _diffusion(request: ClusterRequest) -> DiffusionConfig:
    """The process named by the request with its fields changed; without a name the recipe's, or else vp."""
    name = request.process or "vp"
    if request.write is not None:
        configured = load_recipe(request.write).diffusion
        if request.process not in (None, configured.process):
            problem = f"{request.write} trains the process {configured.process}"
            remedy = f"Use --process {configured.process}, or remove the option."
            raise ConfigError("--process", request.process, problem, remedy)
        if not request.fields:
            return configured
        name = configured.process
    return from_mapping(DiffusionConfig, {"process": name, name: _parsed(request.fields)})


def _sources(request: ClusterRequest) -> list[BlockSource]:
    return image_sources(request.images) if request.images is not None else shard_sources(request.data or "")


def _divide_data(process: Process, sources: list[BlockSource], request: ClusterRequest) -> tuple[Division, bool]:
    """Division by the optimal denoiser, with a progress bar, and whether this process is rank 0 or the only one.

    Under torchrun or srun every rank reads its share of the sources, on its own device; the call is collective.
    """
    count = sum(source.count for source in sources)
    stages, options, lengths = request.stages, request.options, request.lengths
    if is_rank_process():
        with process_group(WaitLimits(step_s=_WAIT_S, start_s=_WAIT_S)) as env:
            share = sum(source.count for source in sources[env.rank :: env.world_size])
            with _passes(share) if env.rank == 0 else nullcontext() as work:
                counted = _counting(work)
                blocks = float_blocks(sources, options.value_range, env.device, env.rank, env.world_size, counted)
                return divide_by_optimal_denoiser(process, blocks, count, stages, options, lengths), env.rank == 0
    with _passes(count) as work:
        blocks = float_blocks(sources, options.value_range, this_device(), track=_counting(work))
        return divide_by_optimal_denoiser(process, blocks, count, stages, options, lengths), True


def _passes(count: int) -> LongWork:
    """Of the optimal denoiser over the data: one draws samples, one denoises them."""
    return LongWork("passing over", 2 * count, "samples")


def _counting(work: LongWork | None) -> Callable[[Iterable[Any]], Iterable[Any]]:
    def counted(blocks: Iterable[Any]) -> Iterator[Any]:
        for first, rows in blocks:
            yield first, rows
            if work:
                work.advance(len(rows))

    return counted


def _divide_gradients(request: ClusterRequest) -> tuple[Division, str]:
    """Division by gradients, and the name of the run's process.

    The gradients are those of the loss of the run's recipe, at the averaged weights of its newest checkpoint, on one
    batch of its data with one noise: only the time differs between them.
    """
    assert request.run is not None
    checkpoint, seed, device = find_checkpoint(request.run), request.options.seed, this_device()
    recipe = stored_recipe(CheckpointIndex.load(checkpoint).recipe)
    process, partition, reader = recipe.process(), recipe.partition(), CheckpointReader(checkpoint)
    shared, decoders = build_parts(recipe.model, range(partition.num_stages))
    for module, prefix in [(shared, "shared."), *((d, f"stages.{k}.") for k, d in decoders.items())]:
        module.load_state_dict(reader.module_state("ema", prefix))
        module.to(device).eval()
    with StepLoader(recipe.data, seed, GRADIENT_BATCH) as loader:
        samples = next(loader)
    x0 = LatentCodec(recipe.autoencoder, recipe.data.kind != "image", device).to_latents(samples.x_nCHW.to(device))
    eps = noise(seed, 0, samples.index_n, tuple(x0.shape[1:])).to(device)
    label, context = (None if c is None else c.to(device) for c in (samples.label_n, samples.context_nTC))
    objective = Objective(process, recipe.train.loss)
    grid = clock_grid(process, GRADIENT_GRID).tolist()
    times = track(grid, "gradients at", "times")
    affinity = gradient_affinity(shared, decoders, objective, partition, x0, eps, times, label, context)
    return divide_by_affinity(process, affinity, request.stages, request.lengths), recipe.diffusion.process


def write_boundaries(recipe: Path, boundaries: Sequence[float], how: str) -> None:
    """Write boundaries into a recipe file, under a comment that says how they were found. The rest of the text stays.

    Raises:
        ConfigError: the recipe does not fit these boundaries: its number of decoders, its process.
    """
    # Edited as text, because YAML written anew would lose the recipe's comments and layout.
    text, values = recipe.read_text(), f"boundaries: [{', '.join(map(str, boundaries))}]"
    section = re.search(r"^stages:[^\n]*\n?(?:[ \t]+[^\n]*\n?|\n)*", text, re.MULTILINE)
    if section is None:
        edited = f"{text.rstrip()}\nstages:\n  {_COMMENT}{how}\n  {values}\n"
    else:
        edited = text[: section.start()] + _edit_section(section.group(), values, how) + text[section.end() :]
    recipe_from(yaml.safe_load(edited))  # raises before anything is written
    atomic_write(recipe, edited)


def _edit_section(section: str, values: str, how: str) -> str:
    """The text of the section `stages` with these boundaries and the comment above them, in place of earlier ones."""
    kept = "".join(line for line in section.splitlines(keepends=True) if not line.lstrip().startswith(_COMMENT))
    found = _BOUNDARIES.search(kept)
    if found is None:
        head, rest = kept.split("\n", 1)
        return f"{head}\n  {_COMMENT}{how}\n  {values}\n{rest}"
    line_start = kept.rfind("\n", 0, found.start()) + 1
    indent = re.match(r"[ \t]*", kept[line_start:]).group()  # type: ignore[union-attr]
    return (
        f"{kept[:line_start]}{indent}{_COMMENT}{how}\n{kept[line_start : found.start()]}{values}{kept[found.end() :]}"
    )


def _parsed(fields: Sequence[str]) -> dict[str, Any]:
    parsed = {}
    for item in fields:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError("override", item, "is not of the form key=value", "Write, for example, beta_max=10.")
        parsed[key] = yaml.safe_load(value)
    return parsed
