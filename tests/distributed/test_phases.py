"""Runs whose stages change at a step: the same on any ranks, resumed anywhere, as in one plain process."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from msdiff_dist.apps.train.phases import phases
from msdiff_dist.apps.train.plan import plan_phases, plan_run
from msdiff_dist.checkpoint.layout import complete_checkpoints
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.checkpoint.power_profile import exponent
from msdiff_dist.data.loader import StepLoader
from msdiff_dist.diffusion.loss import sample_losses
from msdiff_dist.diffusion.timestep_sampler import StageQuotas
from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.export.export import export
from msdiff_dist.export.weights import open_weights
from msdiff_dist.models import build_model
from msdiff_dist.models.growing import grown_from
from msdiff_dist.models.resizing import Resized
from msdiff_dist.models.unet_config import UNetConfig
from msdiff_dist.randomness import dropped_conditions, noise
from msdiff_dist.recipe import Recipe, recipe_from
from msdiff_dist.testing import run_distributed
from tests.distributed.test_validation import recipe_on
from tests.distributed.tiny_run import ADAM, open_run, recipe_of

pytestmark = pytest.mark.distributed

TOLERANCE, LENGTH = 1e-5, 0.1
AT, STEPS = 2, 5
POWER = f"ema_{LENGTH}"
MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}  # powers of the gradient
AVERAGES = ("ema", POWER)
KEPT = {"snapshot_every": 100, "lengths": [LENGTH]}


def grow_recipe(widths: tuple[int, ...] = (12, 8, 4), **changes: Any) -> dict[str, Any]:
    """A run that grows after `AT` steps, from a decoder of width 8."""
    grown = {"grow__at": AT, "train__steps": STEPS, "model__decoder_channels": list(widths), "ema__power": KEPT}
    return recipe_of(ADAM, **grown | changes)


def end_recipe(**changes: Any) -> dict[str, Any]:
    """One whose stage 1 ends after `AT` steps, and stage 0 a step later."""
    ends = {"stages__end": {"at": [AT + 1, AT, None]}, "train__steps": STEPS, "ema__power": KEPT}
    return recipe_of(ADAM, **ends | changes)


def trained(rank: int, world_size: int, mapping: dict[str, Any], path: Path, stops: list[int]) -> list[float]:
    """Resume from the newest checkpoint and train through the phases to the last of `stops`, saving at each; losses."""
    losses: list[float] = []
    while True:
        with open_run(rank, world_size, mapping, path) as run:
            while run.state.step < stops[-1] and not run.phase_is_over():
                losses.append(run.step(mapping["optimizer"]["lr"]).loss)
                run.save_if_due(now=run.state.step in stops or run.phase_is_over())
        if run.state.step == stops[-1]:
            return losses
        run.leave()


@dataclass
class Plain:
    """A run with phases in one process, by plain code. `state` is the last state, by kind and parameter name."""

    losses: list[float]
    state: dict[str, dict[str, Tensor]]


def plain_training(recipe: Recipe) -> Plain:
    """Train through all phases with Adam written out, so that its moments can follow the parameters."""
    seed, B, optimizer = recipe.train.seed, recipe.train.batch_size(1), recipe.optimizer
    loader, losses, state = StepLoader(recipe.data, seed, B), list[float](), dict[str, dict[str, Tensor]]()
    previous: UNetConfig | None = None
    for phase in phases(recipe):
        part, process = phase.recipe, phase.recipe.process()
        model = build_model(part.model, seed)
        named = dict(model.named_parameters())
        if previous is None:
            first = {name: p.detach().clone() for name, p in named.items()}
            state = {kind: {n: torch.zeros_like(p) for n, p in first.items()} for kind in MOMENTS}
            state |= {kind: {n: p.clone() for n, p in first.items()} for kind in ("param", *AVERAGES)}
        elif part.model != previous:
            rules = grown_from(previous, part.model)
            state = {kind: {n: followed(kind, of, how) for n, how in rules.items()} for kind, of in state.items()}
        previous = part.model
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(state["param"][name])
        ended = part.stages.ended
        training = [name for name in named if not name.startswith(tuple(f"stages.{k}." for k in ended))]
        drawn = [k for k in range(part.stages.num_stages) if k not in ended]
        quotas = StageQuotas(process, part.partition(), part.stages.sampling, B, drawn)
        for step in range(phase.first, phase.last + 1):
            batch, draw = next(loader), quotas.draw(seed, step - 1)
            t_B, stage_B = torch.from_numpy(draw.t_B), torch.from_numpy(draw.stage_B)
            eps = noise(seed, step - 1, batch.index_n, batch.x_nCHW.shape[1:])
            dropped = dropped_conditions(seed, step - 1, batch.index_n, part.train.condition_dropout)
            label = torch.where(dropped, part.model.num_classes, batch.label_n)
            x_in, time = process.network_input(process.perturb(batch.x_nCHW, eps, t_B), t_B)
            output = model(x_in, time, stage_B, None, label)
            loss_B = sample_losses(output, process.target(batch.x_nCHW, eps, t_B), "l2")
            weight_B = process.weight(t_B) * torch.from_numpy(quotas.importance_K).float()[stage_B]
            loss = (weight_B * loss_B).sum() / B
            gradients = torch.autograd.grad(loss, [named[name] for name in training])
            norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
            scale = min(1.0, optimizer.grad_clip / (float(norm) + 1e-6))
            new = {"ema": 1 - part.ema.decay_at(step, B), POWER: 1 - ((step - 1) / step) ** (exponent(LENGTH) + 1)}
            with torch.no_grad():
                for name, gradient in zip(training, gradients, strict=True):
                    p, g = named[name], gradient * scale
                    m, v = state["exp_avg"][name].lerp_(g, 0.1), state["exp_avg_sq"][name].lerp_(g * g, 0.001)
                    p.mul_(1 - optimizer.lr * optimizer.weight_decay)
                    p.sub_(optimizer.lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + optimizer.eps))
                    state["param"][name].copy_(p)
                    for kind, share in new.items():
                        state[kind][name].lerp_(p, share)
            losses.append(float(loss.detach()))
    return Plain(losses, state)


def followed(kind: str, old: dict[str, Tensor], how: Resized | None) -> Tensor:
    assert how is not None
    was = old[how.name].clone()
    return how.apply_to_gradient(was, MOMENTS[kind]) if kind in MOMENTS else how.apply(was)


CASES = {
    "widths": grow_recipe(),
    "equal widths": grow_recipe((8, 8, 8)),
    "own encoders": grow_recipe((8, 8, 8), model__share_encoder=False, parallel__zero_decoders=2),
    "accumulated, ZeRO 3": grow_recipe(train__gradient_accumulation_steps=2, parallel__zero_shared=3),
    "ends": end_recipe(),
    "ends, ZeRO 3": end_recipe(parallel__zero_shared=3),
    "ends of own encoders": end_recipe(model__share_encoder=False, stages__sampling="uniform"),
    "grows and ends": grow_recipe(stages__end={"at": [None, AT + 1, None]}),
}


def train_each(rank: int, world_size: int, path: Path) -> list[list[float]]:
    return [trained(rank, world_size, case, path / name, [STEPS]) for name, case in CASES.items()]


@pytest.mark.parametrize("world_size", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_as_in_one_process(world_size: int, tmp_path: Path) -> None:
    of_ranks = run_distributed(train_each, world_size, world_size, tmp_path)
    for (name, case), losses in zip(CASES.items(), of_ranks[0], strict=True):
        plain = plain_training(recipe_from(case))
        assert losses == pytest.approx(plain.losses, rel=TOLERANCE), name
        last = CheckpointReader(tmp_path / name / f"checkpoints/step_{STEPS:08d}")
        ended = tuple(f"stages.{k}." for k in map(int, last.index.stage_ends.get("ended", ())))
        assert bool(ended) == ("end" in case["stages"])
        for stage in ended:  # its averages stay its own
            head = [name for name in last.names(stage) if name.endswith("out.2.bias")]
            assert not any(torch.equal(last.tensor("param", name), last.tensor("ema", name)) for name in head)
        for kind, state in plain.state.items():
            assert sorted(last.names()) == sorted(state)
            for parameter, expected in state.items():
                if kind in MOMENTS and parameter.startswith(ended):
                    assert not last.holds(kind, parameter)
                    continue
                found = last.tensor(kind, parameter)
                torch.testing.assert_close(
                    found, expected, rtol=0, atol=TOLERANCE, msg=lambda m, p=f"{name}: {kind} {parameter}": f"{p}: {m}"
                )


def resume_each(rank: int, world_size: int, path: Path) -> None:
    """Stop and resume at every step; losses and the last state must be the same bit by bit."""
    for name in ("widths", "grows and ends"):
        mapping, run = CASES[name], path / name
        steps = list(range(1, STEPS + 1))
        losses = trained(rank, world_size, mapping, run, steps)
        whole = whole_state(run)
        for at in steps[:-1]:
            dist.barrier()
            if rank == 0:
                for later in steps[at:]:
                    shutil.rmtree(run / f"checkpoints/step_{later:08d}", ignore_errors=True)
            dist.barrier()
            assert trained(rank, world_size, mapping, run, steps) == losses[at:], (name, at)
            again = whole_state(run)
            assert whole.keys() == again.keys()
            assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items()), (name, at)


def whole_state(run: Path) -> dict[tuple[str, str], Tensor]:
    reader = CheckpointReader(run / f"checkpoints/step_{STEPS:08d}")
    return {(k, n): reader.tensor(k, n) for k in reader.kinds for n in reader.names() if reader.holds(k, n)}


@pytest.mark.slow
def test_resumed_at_every_step_it_is_the_same_bit_by_bit(tmp_path: Path) -> None:
    run_distributed(resume_each, 2, 2, tmp_path)
    mapping, run = CASES["widths"], tmp_path / "widths"
    reference = plain_training(recipe_from(mapping)).losses
    for at in (AT - 1, AT, AT + 1):
        other = tmp_path / f"resumed at {at}"
        for step in range(1, at + 1):
            shutil.copytree(run / f"checkpoints/step_{step:08d}", other / f"checkpoints/step_{step:08d}")
        losses = run_distributed(trained, 3, 3, mapping, other, [STEPS])[0]
        assert losses == pytest.approx(reference[at:], rel=TOLERANCE)
    # Checkpoints are of the architecture that they hold.
    models = [open_weights(run, step).description.model.decoder_channels for step in (AT, AT + 1)]
    assert models == [(8,), (12, 8, 4)]
    generator = ImageGenerator(open_weights(run, AT), torch.device("cpu"))
    assert generator.num_stages == 1


# Gradients wait in both: those of stage 1 when it ends, and those of all stages, one of which has the whole batch.
WAITING = {
    "ends": end_recipe(stages__min_samples_per_step=8, stages__sampling=[3, 1, 2], stages__end={"at": [None, 3, None]}),
    "grows": grow_recipe(stages__min_samples_per_step=30, stages__batch="one_stage", train__steps=8),
}


def waiting(rank: int, world_size: int, path: Path, stops: dict[str, list[int]]) -> dict[str, list[float]]:
    return {name: trained(rank, world_size, WAITING[name], path / name, stops[name]) for name in WAITING}


def test_gradients_that_wait_pass_a_change_of_stages_on_other_ranks(tmp_path: Path) -> None:
    """Runs on one rank, and the same on two ranks up to a step after the change, and then on one."""
    change, last = {"ends": 4, "grows": AT + 1}, {name: case["train"]["steps"] for name, case in WAITING.items()}
    (whole,) = run_distributed(
        waiting, 1, 1, tmp_path / "whole", {name: [change[name], last[name]] for name in WAITING}
    )
    first = run_distributed(waiting, 2, 2, tmp_path / "parts", {name: [change[name]] for name in WAITING})[0]
    (then,) = run_distributed(waiting, 1, 1, tmp_path / "parts", {name: [n] for name, n in last.items()})
    for name in WAITING:
        assert first[name] + then[name] == pytest.approx(whole[name], rel=TOLERANCE), name
        steps = [change[name], last[name]]
        counts = [
            [CheckpointReader(tmp_path / run / name / f"checkpoints/step_{step:08d}").index.stages for step in steps]
            for run in ("whole", "parts")
        ]
        assert counts[0] == counts[1], name
        assert any(counts[0][0]["gathered"]), "gradients wait when the run stops"
    # Quotas are 12, 4 and 8. Stage 1 has stepped once in the three steps before its end, and does nothing more.
    ended = CheckpointReader(tmp_path / f"whole/ends/checkpoints/step_{STEPS:08d}").index.stages
    assert (ended["samples"][1], ended["gathered"][1], ended["steps"][1]) == (12, 4, 1)


def test_a_decoder_that_would_end_before_its_first_step_is_refused() -> None:
    never = end_recipe(stages__min_samples_per_step=9, stages__sampling=[3, 1, 2])
    plan_run(recipe_from(never), 1)  # in all steps it would have 20 samples
    with pytest.raises(ConfigError, match=r"stage 1 gets about 8 samples in 5 steps: its decoder would never step"):
        plan_phases(recipe_from(never), 1)
    late = grow_recipe(stages__min_samples_per_step=30, stages__batch="one_stage")
    with pytest.raises(ConfigError, match=r"gets about 24 samples in 5 steps"):
        plan_phases(recipe_from(late), 1)


def test_averages_made_after_training_are_of_the_grown_model_alone(tmp_path: Path) -> None:
    power = {"snapshot_every": 1, "lengths": [LENGTH, 0.05]}
    run_distributed(trained, 1, 1, grow_recipe(ema__power=power), tmp_path / "run", [STEPS])
    held = CheckpointReader(tmp_path / f"run/ema_snapshots/step_{STEPS:08d}")
    assert len(complete_checkpoints(tmp_path / "run/ema_snapshots")) == STEPS
    export(tmp_path / "run", tmp_path / "held", ema_length=LENGTH)
    made = load_file(tmp_path / "held/model.safetensors")
    assert sorted(made) == sorted(held.names())
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, held.tensor(POWER, name), rtol=0, atol=1e-6)
    unified = export(tmp_path / "run", tmp_path / "unified", step=AT, ema_length=LENGTH)
    assert not any(name.startswith("stages.1.") for name in load_file(unified[-1]))


def watched(rank: int, world_size: int, mapping: dict[str, Any], path: Path) -> tuple[list[list[float]], Any]:
    """Train to the end; the stages' held-out losses at each validation, and what is remembered of their ends."""
    losses = []
    while True:
        with open_run(rank, world_size, mapping, path) as run:
            while run.state.step < STEPS and not run.phase_is_over():
                run.step(mapping["optimizer"]["lr"])
                losses.append(run.validate()["loss_per_stage"])
            run.save()
        if run.state.step == STEPS:
            return losses, run.state.ends.stored()
        run.leave()


def test_patience_ends_the_same_stages_on_any_ranks(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    end = {"patience": 1, "min_delta": 0.02}
    mapping = recipe_on(tmp_path / "shards", stages__end=end, train__steps=STEPS, ema__decay=0.0, optimizer__lr=0.02)
    mapping["validation"] |= {"every": 1, "weights": "ema"}
    found = []
    for world_size in (1, 3):
        run = tmp_path / str(world_size)
        (run / "samples").mkdir(parents=True)
        of_ranks = run_distributed(watched, world_size, world_size, mapping, run)
        assert all(of_rank == of_ranks[0] for of_rank in of_ranks)
        found.append(of_ranks[0])
    (losses, ends), (others, ends_of_three) = found
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(others), rtol=1e-3, atol=0)
    ended: dict[str, int] = {}
    for k, of_stage in enumerate(zip(*losses, strict=True)):
        fell = [loss < 0.98 * lowest for lowest, loss in itertools.pairwise(of_stage)]
        if False in fell:  # up to there each is the lowest
            ended[str(k)] = 2 + fell.index(False)
    assert 0 < len(ended) < 3, losses
    assert ends["ended"] == ends_of_three["ended"] == ended
    assert ends["waited"] == ends_of_three["waited"]
