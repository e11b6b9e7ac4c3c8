"""A sampling job: how many images, which classes or prompts, by which sampler, from which seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from msdiff_dist.bounds import check_between, check_seed
from msdiff_dist.config import to_mapping
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.solvers import SOLVERS, SamplerConfig
from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.evaluation.grid import class_labels
from msdiff_dist.export.weights import Weights
from msdiff_dist.terminal import LongWork

MOST_IMAGES = 10**7
"""Images that one command may make."""
_WIDEST_GRID = 20  # largest number of classes that get a column each


@dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """The images with numbers 0 to `num` - 1.

    Each depends on the weights, these settings and its number. Its last bits also depend on the batch it is made in.

    Args:
        sampler: solver, steps, guidance and noise.
        class_: class of all images; None: image i has class i modulo the number of classes.
        prompts: image i has prompt i modulo their number; none: images without a caption.
        batch_size: number of images sampled together.
    """

    num: int
    seed: int = 0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    class_: int | None = None
    prompts: tuple[str, ...] = ()
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_between("--num", self.num, 1, MOST_IMAGES)
        check_between("--batch-size", self.batch_size, 1, MOST_IMAGES)
        check_seed("--seed", self.seed)

    def resolved(self, process: Process, evaluations: int | None = None) -> SamplingJob:
        """The job with the default solver of `process` filled in.

        Args:
            evaluations: number of network evaluations per image, instead of the sampler's `steps`.

        Raises:
            ConfigError: the sampler does not fit the process. It names the option of `msdiff sample`.
        """
        sampler = self.sampler
        try:
            if evaluations is not None:
                name = sampler.name or process.sampler
                sampler = replace(sampler, name=name, steps=SOLVERS.choose("name", name).steps_of(evaluations))
            return replace(self, sampler=sampler.for_process(process))
        except ConfigError as e:
            # Users of the command know its options, not the fields of `SamplerConfig`.
            steps = "steps" if evaluations is None else "nfe"
            option = {"name": "sampler", "steps": steps, "evaluations": "nfe"}.get(e.field, e.field)
            raise ConfigError(f"--{option}", e.value, e.problem, e.remedy) from None

    def settings(self, weights: Weights) -> dict[str, Any]:
        """All that the images depend on, as JSON values."""
        about = weights.description
        sampler = to_mapping(self.sampler)
        if _last_is_as_before(self.sampler, about.process()):
            del sampler["last"]
        return {
            "source": {"step": about.step, "weights": about.weights, "sha256": weights.identity()},
            "num": self.num,
            "seed": self.seed,
            "class": self.class_,
            "prompts": list(self.prompts),
            "sampler": sampler,
            "batch_size": self.batch_size,
        }

    @property
    def batches(self) -> list[range]:
        """Numbers of the images of each batch."""
        return [range(i, min(i + self.batch_size, self.num)) for i in range(0, self.num, self.batch_size)]

    def draw(
        self,
        generator: ImageGenerator,
        index_n: Sequence[int],
        work: LongWork | None = None,
        seen: Callable[[float, int, Tensor], object] | None = None,
    ) -> Tensor:
        """The images with the numbers `index_n`, uint8 [n, C, H, W].

        Args:
            work: counts images; each call of the network makes a part of them.
            seen: is shown the estimates of x0, as `ImageGenerator` has it.

        Raises:
            ConfigError: there is no such class, or there are prompts for a model that takes none.
        """
        labels = class_labels(index_n, generator.num_classes, self.class_)
        if work is None:
            return generator(index_n, self.sampler, self.seed, labels, self.prompts, seen=seen)
        share = len(index_n) / generator.calls(self.sampler)
        return generator(index_n, self.sampler, self.seed, labels, self.prompts, lambda: work.advance(share), seen)

    def columns(self, num_classes: int | None) -> int | None:
        """Number of columns of the grid, one per class; None: a square grid."""
        return num_classes if self.class_ is None and num_classes and num_classes <= _WIDEST_GRID else None


def _last_is_as_before(sampler: SamplerConfig, process: Process) -> bool:
    """Whether the images are those of versions without `SamplerConfig.last`, whose folders are then gone on with."""
    named = sampler.for_process(process)
    if named.name is None or "last" not in SOLVERS[named.name].options:
        return True
    landing, before = (
        process.sampling_times(named.steps, named.spacing, named.end, last)[1] for last in (named.last, None)
    )
    # DPM-Solver++'s last step to a time with noise had order 1 in those versions.
    return landing == before and (landing == 0 or named.name != "dpmpp_2m")
