"""Stages that predict different things: trained each on its own, and one model to solvers and measures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msdiff_dist.config import from_mapping, to_mapping
from msdiff_dist.data.samples import Samples
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig, build_process, build_times, of_stage
from msdiff_dist.diffusion.objective import Objective
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.sampling import sample
from msdiff_dist.diffusion.solvers import SamplerConfig
from msdiff_dist.diffusion.stage_partition import build_partition
from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.held_out_loss import HeldOutLoss, ValidationConfig
from msdiff_dist.models.autoencoder import AutoencoderConfig, LatentCodec

PREDICTIONS = ["v_prediction", "epsilon", "sample"]
OBJECTIVES = [{"prediction_type": "v_prediction"}, {}, {"prediction_type": "sample", "min_snr_gamma": 2.0}]
BOUNDARIES = {"discrete": [442, 631], "vp": [0.442, 0.631]}
TIMES = {
    "discrete": torch.tensor([0, 441, 442, 630, 631, 999]),
    "vp": torch.tensor([0.01, 0.44, 0.442, 0.63, 0.631, 0.99], dtype=torch.float64),
}
C = 0.7  # standard deviation of the data, which are Gaussian


def configs(process: str, objectives: list[dict[str, Any]]) -> tuple[DiffusionConfig, StagesConfig]:
    stages = {"boundaries": BOUNDARIES[process], "sampling": "equal", "objectives": objectives}
    return from_mapping(DiffusionConfig, {"process": process}), from_mapping(StagesConfig, stages)


def predictor(process: Process, predictions: list[str]) -> Any:
    """The best network for data N(0, C^2): what it predicts in each stage follows from the posterior mean of x_0."""
    find = build_partition(
        StagesConfig(boundaries=tuple(BOUNDARIES["discrete" if process.discrete else "vp"])), process
    )

    def network(x: Tensor, t_in: Tensor, stage: int, label: Any, context: Any) -> Tensor:
        t = t_in.double() if process.discrete else t_in.double() / 999
        assert (find.stage_of(t) == stage).all()
        s, n = (scale.view(-1, 1, 1, 1) for scale in process.scales(t))
        x0 = C**2 * s / (C**2 * s**2 + n**2) * x
        eps = (x - s * x0) / n
        return {"epsilon": eps, "v_prediction": s * eps - n * x0, "sample": x0}[predictions[stage]]

    return network


@pytest.mark.parametrize("process", ["discrete", "vp"])
def test_each_time_has_the_objective_of_its_stage(process: str) -> None:
    mixed = Objective(build_process(*configs(process, OBJECTIVES)), times=build_times(*configs(process, OBJECTIVES)))
    t = TIMES[process]
    draw = torch.Generator().manual_seed(0)
    x0, eps, output = (torch.randn(6, 2, 4, 4, generator=draw) for _ in range(3))
    found = mixed.noised(x0, eps, t)
    for k, objective in enumerate(OBJECTIVES):
        alone = Objective(build_process(from_mapping(DiffusionConfig, {"process": process, process: objective})))
        rows = slice(2 * k, 2 * k + 2)
        wanted = alone.noised(x0, eps, t)
        assert torch.equal(found.target_nCHW[rows], wanted.target_nCHW[rows])
        assert torch.equal(found.weight_n[rows], wanted.weight_n[rows])
        assert torch.equal(found.x_nCHW[rows], wanted.x_nCHW[rows])
        denoised = mixed.process.denoised(output, found.x_nCHW, t)[rows]
        assert torch.equal(denoised, alone.process.denoised(output, found.x_nCHW, t)[rows])
    torch.testing.assert_close(
        mixed.process.denoised(found.target_nCHW, found.x_nCHW, t)[1:], x0[1:], rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize(
    ("process", "sampler"),
    [
        ("discrete", {"name": "ddim"}),
        ("discrete", {"name": "ddpm"}),
        ("discrete", {"name": "dpmpp_2m"}),
        ("vp", {"name": "dpm_3s", "steps": 15}),
        ("vp", {"name": "ddim", "spacing": "uniform"}),
    ],
)
def test_solvers_see_one_model(process: str, sampler: dict[str, Any]) -> None:
    images = []
    for objectives, predictions in (([], ["epsilon"] * 3), (OBJECTIVES, PREDICTIONS)):
        built = build_process(*configs(process, objectives))
        partition = build_partition(configs(process, objectives)[1], built)
        config = SamplerConfig(**{"steps": 20} | sampler)
        network = predictor(built, predictions)
        images.append(sample(network, built, partition, config, seed=1, index_n=range(4), shape=(2, 4, 4)))
    torch.testing.assert_close(images[1], images[0], rtol=1e-3, atol=1e-3)
    assert images[0].abs().max() > 0.3


@pytest.mark.parametrize("process", ["discrete", "vp"])
def test_held_out_losses_compare_as_errors_of_the_noise(process: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, C, (40, 2, 4, 4)).astype(np.float32)
    samples = Samples(key_n=np.array([str(i) for i in range(40)], dtype=object), x_nCHW=x)
    config, codec = ValidationConfig(fraction=0.5, num=200), LatentCodec(AutoencoderConfig(), True, torch.device("cpu"))
    found = []
    for objectives, predictions in (([], ["epsilon"] * 3), (OBJECTIVES, PREDICTIONS)):
        diffusion, stages = configs(process, objectives)
        built = build_process(diffusion, stages)
        loss = HeldOutLoss(
            config, samples, stored_latents=True, process=built, times=build_times(diffusion, stages),
            partition=build_partition(stages, built), probability_K=np.full(3, 1 / 3), loss="l2",
        )  # fmt: skip
        network = predictor(built, predictions)
        model: Any = type(
            "Model", (), {"device": torch.device("cpu"), "num_stages": 3, "network": staticmethod(network)}
        )
        losses_n = np.empty(config.num)
        for batch in loss.batches:
            losses_n[batch.rows] = loss.compute(model, codec, batch)
        found.append(loss.summary(losses_n))
    plain, mixed = found
    assert plain["epsilon"] == pytest.approx(plain["unweighted"], rel=1e-5), "what is predicted is the noise"
    assert mixed["epsilon"] == pytest.approx(plain["epsilon"], rel=1e-3)
    assert mixed["epsilon_per_stage"] == pytest.approx(plain["epsilon_per_stage"], rel=1e-3)
    assert mixed["loss_per_stage"] != pytest.approx(plain["loss_per_stage"], rel=0.1)


@pytest.mark.parametrize(
    ("process", "boundaries", "objectives", "message"),
    [
        (
            "edm",
            [2.5],
            [{}, {"prediction_type": "sample"}],
            r"stages.objectives\[1\].prediction_type = 'sample': means ",
        ),
        ("discrete", [442], [{}], r"objectives = 1: are not one for each of 2. Give 2"),
        ("discrete", [], [{}], r"objectives = 1: a model of one stage has one objective. Write it in the process's"),
        ("vp", [0.5], [{}, {"prediction_type": "noise"}], r"objectives\[1\].prediction_type = 'noise'"),
        ("vp", [0.5], [{}, {"min_snr_gamma": 0}], r"objectives\[1\].min_snr_gamma = 0"),
    ],
)
def test_objectives_that_make_no_sense(process: str, boundaries: Any, objectives: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_process(
            from_mapping(DiffusionConfig, {"process": process}),
            from_mapping(StagesConfig, {"boundaries": boundaries, "objectives": objectives}, "stages"),
        )


def test_one_stage_keeps_its_objective() -> None:
    diffusion, stages = configs("discrete", OBJECTIVES)
    settings = [to_mapping(of_stage(diffusion, stages, k).settings()) for k in range(3)]
    assert [one["prediction_type"] for one in settings] == PREDICTIONS
    assert [one["min_snr_gamma"] for one in settings] == [None, None, 2.0]
    assert from_mapping(StagesConfig, to_mapping(stages)) == stages
