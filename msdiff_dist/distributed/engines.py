"""The parts of a model stepping as one: the shared encoder, over all ranks, and the decoder of each held stage, over
the ranks that hold it.

The graph is cut between them. A micro batch runs the shared encoder once, then every held stage on detached features
(forward, loss, backward, stages ascending), then the gradients of the features go back through the encoder in one
backward pass. Each part's reduction over its group begins when its backward pass has ended: those of the stages run
while the encoder's backward computes. Every rank thus issues its collectives in one explicit order, and groups may
overlap freely. A projector of the encoder's features, which trains with the model (`guide`), is like a stage of all
samples: it comes after the stages, on every rank or on none. Reductions are sums of gradients of a loss divided by the
GLOBAL batch size, so they are the exact global mean whatever the sizes of the groups.

A step calls `forward_backward` for every micro batch, or `stand_by` on a rank that has no samples in it, then
`agreement`, to which other code adds what the ranks must sum, then `reduce`, which makes the global gradient norm
known, then the `step` of what `reduce` returned. No optimizer can step before the norm is known, because only the
result of `reduce` has that method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msdiff_dist.distributed.agree import Agreement
from msdiff_dist.distributed.device_clock import DeviceClock
from msdiff_dist.distributed.groups import Groups, all_ranks
from msdiff_dist.distributed.part_engines import EngineConfig, OptimizerFactory, PartEngine, make_engine
from msdiff_dist.distributed.zero_state import ShardedState
from msdiff_dist.models.projector import Projection

StageLoss = Callable[[int, Tensor, slice], Tensor]
"""(stage, output of its decoder, rows of the batch that the output belongs to) -> this rank's scalar loss."""
ProjectedLoss = Callable[[Tensor], Tensor]
"""Projected features of all rows -> this rank's scalar loss."""


@dataclass(frozen=True)
class Turn:
    """What the decoder of a stage does after a global batch.

    Attributes:
        samples: of the stage in the batch; 0: the decoder has no gradient and does nothing.
        gathered: samples of earlier batches whose gradients have waited.
        steps: whether its optimizer steps, on the mean over all these samples. If not, the gradient waits too.
    """

    samples: int
    gathered: int = 0
    steps: bool = True


@dataclass(frozen=True, kw_only=True)
class ReducedGradients:
    """The gradients of one global batch, known to every rank and ready to step on.

    Attributes:
        sums: sums over the ranks of everything in the step's agreement, by name.
        norm: norm of the gradient of all parts that step, before clipping.
        finite: whether all gradients are, those that wait too.
    """

    sums: Mapping[str, Tensor]
    norm: Tensor
    finite: bool
    _step: Callable[[float], None]

    def step(self, lr: float) -> None:
        """Step every optimizer of this rank with learning rate `lr`. Once."""
        self._step(lr)


class StageParallelEngines:
    """The shared engine and the engines of the stages this rank holds, stepping as one model.

    Args:
        shared: maps the network's inputs to a tuple of features, batch first. It may have no parameters. Here and in
            the stages, parameters that require no gradient are frozen.
        stages: for each held stage, the module that maps (a row range of) those features to the output.
        optimizer: makes a torch optimizer for a list of parameters; called once per engine.
        groups: this rank's process groups.
        device: where the modules are.
        gathering: stages whose decoders may let gradients wait for those of later batches.
        projection: of the shared features; the same on every rank.

    Attributes:
        forward_clock: how long this rank computes without waiting for others: the time of its forward passes, in which
            there is no collective (under ZeRO 1 and 2). On a CPU it is this thread's computing time.
        shared: the encoder's engine, None for an encoder without parameters.
        stages: the decoders' engines by stage.
        projector: the engine of the projection, over all ranks as `shared` and under the same ZeRO level, but at most
            2; None without one.
    """

    def __init__(
        self,
        shared: nn.Module,
        stages: Mapping[int, nn.Module],
        optimizer: OptimizerFactory,
        config: EngineConfig,
        groups: Groups,
        device: torch.device,
        gathering: Collection[int] = (),
        projection: Projection | None = None,
    ) -> None:
        self.config = config
        self.forward_clock = DeviceClock(device, time.thread_time)
        self._shared_module = shared
        self._device = device
        self._micro_batches = 0  # of the current global batch that have run
        self._turns: Sequence[Turn] | None = None  # of the current global batch
        has_parameters = any(True for _ in shared.parameters())
        world = all_ranks()
        self.shared = make_engine(shared, optimizer, config.zero_shared, config, world) if has_parameters else None
        self.stages: dict[int, PartEngine] = {}
        for k in sorted(stages):
            group, gathers = groups.stage[k], k in gathering
            self.stages[k] = make_engine(stages[k], optimizer, config.zero_decoders, config, group, gathers)
        self._projection = projection
        self._projects = False  # whether the projector has gradients of the current global batch
        self.projector: PartEngine | None = None
        if projection:
            # ZeRO 3 scales the gradients of a module's inputs, and would shard little here.
            self.projector = make_engine(projection.module, optimizer, min(config.zero_shared, 2), config, world)

    def _named(self) -> dict[str, PartEngine]:
        """The parts by the prefix of their parameter names, in the order of their reductions: held stages ascending,
        then the projector, then the shared part."""
        named = {f"stages.{k}.": engine for k, engine in self.stages.items()}
        if self._projection and self.projector:
            named[self._projection.prefix] = self.projector
        return named | ({"shared.": self.shared} if self.shared else {})

    def _trained(self) -> dict[str, PartEngine]:
        """Those of `_named` that train in this step; every rank has one."""
        idle = None if self._projects else self.projector
        return {prefix: engine for prefix, engine in self._named().items() if engine.trains and engine is not idle}

    def state(self) -> dict[str, ShardedState]:
        """This rank's fp32 shards, by the prefix of their parameter names in the whole model."""
        return {prefix: engine.state() for prefix, engine in self._named().items()}

    def forward_backward(
        self,
        inputs: Sequence[Tensor | None],
        rows: Mapping[int, slice],
        loss: StageLoss,
        projected_loss: ProjectedLoss | None = None,
    ) -> None:
        """One micro batch.

        Args:
            inputs: of the shared module, all samples of this rank in one batch, sorted by stage.
            rows: for every held stage of which the batch has samples its rows, at least one each.
            loss: this rank's share of a stage's loss, already divided by the global batch size.
            projected_loss: the same of the projected features; None: the projector has no part in this step. In all
                micro batches of a step, on all ranks, it is there or it is not.
        """
        assert not self._is_complete(), "the global batch is complete: step before the next micro batch"
        is_last = self._micro_batches + 1 == self.config.gradient_accumulation_steps
        if self.shared:
            self.shared.wait_for_weights()  # outside of the clock, which counts this rank's own computing
        # Nothing of a frozen encoder is kept for a backward pass: its features need no gradients.
        trains_shared = self.shared is not None and self.shared.trains
        with self.forward_clock, torch.set_grad_enabled(trains_shared):
            features = (self.shared or self._shared_module)(*inputs)
        # Cut the graph: each stage computes on leaves of its own, and the gradients that arrive there are collected in
        # one buffer per feature. Every row belongs to exactly one stage, so each row of a buffer is written once.
        differentiable = [i for i, f in enumerate(features) if f.requires_grad]
        gradients = [torch.empty_like(features[i]) for i in differentiable]
        for k, engine in ((k, self.stages[k]) for k in rows):
            leaves = [f.detach()[rows[k]].requires_grad_(i in differentiable) for i, f in enumerate(features)]
            engine.wait_for_weights()
            with self.forward_clock:
                stage_loss = loss(k, engine(*leaves), rows[k])
            engine.backward([stage_loss], None, is_last)
            for gradient, i in zip(gradients, differentiable, strict=True):
                leaf_grad = leaves[i].grad
                if leaf_grad is None:  # a stage without cross-attention ignores the context
                    gradient[rows[k]].zero_()
                else:
                    gradient[rows[k]].copy_(leaf_grad)
        self._projects = projected_loss is not None
        if projected_loss:
            assert self._projection is not None
            assert self.projector is not None
            of = self._projection.feature % len(features)
            leaf = features[of].detach().requires_grad_(of in differentiable)
            self.projector.wait_for_weights()
            with self.forward_clock:
                projected = projected_loss(self.projector(leaf))
            self.projector.backward([projected], None, is_last)
            if leaf.grad is not None:
                gradients[differentiable.index(of)].add_(leaf.grad)
        # One backward of the encoder for all stages, last of all on every rank, over the world.
        if self.shared and trains_shared:
            self.shared.backward([features[i] for i in differentiable], gradients, is_last)
        self._micro_batches += 1

    def stand_by(self, projects: bool = False) -> None:
        """One micro batch of which this rank has no samples: it takes part in the reductions of the shared part and of
        the projector alone.

        No rank of a stage stands by while another computes the stage.

        Args:
            projects: whether the projector has a part in this step.
        """
        assert not self._is_complete(), "the global batch is complete: step before the next micro batch"
        is_last = self._micro_batches + 1 == self.config.gradient_accumulation_steps
        self._projects = projects
        if projects:
            assert self.projector is not None
            self.projector.no_backward(is_last)
        if self.shared:
            self.shared.no_backward(is_last)
        self._micro_batches += 1

    def agreement(self, turns: Sequence[Turn] | None = None, of_decoders: bool = False) -> Agreement:
        """What the ranks sum in this step's one reduction; it already has the squares of the gradients.

        To be called after the last micro batch. Waits for the reductions of gradients. Every gradient element of the
        encoder and of the decoders lives on exactly one rank, so the sum over the ranks of the squares of their own
        elements is the squared norm of the whole gradient.

        Args:
            turns: what the decoder of every stage does, the same on every rank; None: all step.
            of_decoders: whether the agreement also gets `decoder square sums`, by stage, of this batch's gradients.
        """
        assert self._is_complete(), "micro batches are missing from the global batch"
        self._turns = turns
        squares = self._decoder_squares(turns) if of_decoders and turns is not None else None
        for k, engine in self.stages.items():
            turn = self._turn(f"stages.{k}.")
            if engine.trains and turn.steps and turn.samples and turn.gathered:
                engine.join(turn.samples, turn.gathered)
        agreement = Agreement(self._device)
        stepping, waiting = self._with_gradients(steps=True), self._with_gradients(steps=False)
        agreement.add("gradient square sum", torch.stack([self._square_sum(stepping), self._square_sum(waiting)]))
        if squares is not None:
            agreement.add("decoder square sums", squares)
        return agreement

    def reduce(self, agreement: Agreement) -> ReducedGradients:
        """Sum `agreement` over the ranks. One world all_reduce."""
        sums = agreement.reduce()
        squares = sums["gradient square sum"]
        norm = squares[0].sqrt().float()
        finite = bool(norm.isfinite() and squares[1].isfinite())
        return ReducedGradients(sums=sums, norm=norm, finite=finite, _step=lambda lr: self._step(lr, float(norm)))

    def modules_with_bad_gradients(self) -> list[str]:
        """Names of the modules of which a gradient element on this rank is not finite, after the reduction."""
        having = self._with_gradients(steps=True) | self._with_gradients(steps=False)
        bad = [prefix for prefix, e in having.items() if not e.gradient_square_sum().isfinite()]
        return [_title(prefix) for prefix in bad]

    def finish(self) -> None:
        """Wait for all that runs in the background, as must be before the process groups are left."""
        for engine in self._named().values():
            engine.wait_for_weights()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _is_complete(self) -> bool:
        """Whether the micro batches of a global batch have all run, and no step has followed."""
        return self._micro_batches == self.config.gradient_accumulation_steps

    def _turn(self, prefix: str) -> Turn:
        """The turn of a part; the shared part and the projector, and without turns every part, always step."""
        if self._turns is None or not prefix.startswith("stages."):
            return Turn(samples=1)
        return self._turns[int(prefix.split(".")[1])]

    def _with_gradients(self, steps: bool) -> dict[str, PartEngine]:
        """The parts with a gradient on which they step now, or which is to wait."""
        return {
            prefix: engine
            for prefix, engine in self._trained().items()
            if (turn := self._turn(prefix)).samples and turn.steps == steps
        }

    def _square_sum(self, parts: Mapping[str, PartEngine]) -> Tensor:
        """Sum of squares of the gradients of these parts on this rank, a float64 scalar on the device."""
        if not parts:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.stack([engine.gradient_square_sum() for engine in parts.values()]).sum()

    def _decoder_squares(self, turns: Sequence[Turn]) -> Tensor:
        """Sums of squares of each decoder's gradient elements on this rank, float64 [K] on the device."""
        having = self._with_gradients(steps=True) | self._with_gradients(steps=False)
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        engines = [having.get(f"stages.{k}.") for k in range(len(turns))]
        return torch.stack([zero if engine is None else engine.gradient_square_sum() for engine in engines])

    def _step(self, lr: float, norm: float) -> None:
        # The shared part first, whose new weights the next forward pass needs first.
        for engine in reversed(self._with_gradients(steps=True).values()):
            engine.step(lr, norm)
        for prefix, engine in self._with_gradients(steps=False).items():
            engine.gather(self._turn(prefix).samples)
        self._micro_batches = 0


def _title(prefix: str) -> str:
    """What messages call the part whose parameters' names have this prefix."""
    if prefix.startswith("stages."):
        return f"stage {prefix.split('.')[1]}"
    return "the shared part" if prefix == "shared." else f"the projector of {prefix.removesuffix('.')}"
