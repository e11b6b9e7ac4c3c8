"""What patterns freeze, and what frozen parameters cost, held to the counts of real passes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from msdiff_dist.errors import ConfigError
from msdiff_dist.models import LDMConfig
from msdiff_dist.models.activation_checkpointing import ActivationCheckpointingConfig
from msdiff_dist.models.flops import costs
from msdiff_dist.models.freezing import freezing
from msdiff_dist.models.multistage_unet import build_model
from msdiff_dist.models.trace import trace_model

MODEL = LDMConfig(
    encoder_channels=8,
    decoder_channels=(12, 8, 4),
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_downsamples=(2,),
    num_heads=2,
    norm_groups=4,
    attention_backend="math",
)
NAMES = [name for name, _ in build_model(MODEL).named_parameters()]
SIZE = 8


@pytest.mark.parametrize(
    ("patterns", "beginnings", "stages"),
    [
        ((), (), (0, 1, 2)),
        (("shared",), ("shared.",), (0, 1, 2)),
        (("stages.1",), ("stages.1.",), (0, 1, 2)),
        (("shared", "stages.[12]"), ("shared.", "stages.1.", "stages.2."), (0,)),
        (("shared", "stages.1.out*"), ("shared.", "stages.1.out"), (0, 2)),
        (("stages.*.out",), ("stages.0.out.", "stages.1.out.", "stages.2.out."), (0, 1, 2)),
        (("shared.time_embed.0.weight",), ("shared.time_embed.0.weight",), (0, 1, 2)),
    ],
)
def test_patterns(patterns: tuple[str, ...], beginnings: tuple[str, ...], stages: tuple[int, ...]) -> None:
    found = freezing(MODEL, patterns)
    assert sorted(found.names) == sorted(n for n in NAMES if beginnings and n.startswith(beginnings))
    assert found.stages == stages


def test_separate_stages_have_no_shared_part() -> None:
    separate = dataclasses.replace(MODEL, share_encoder=False)
    assert freezing(separate, ("stages.1", "stages.2.encoder")).stages == (0, 2)
    with pytest.raises(ConfigError, match=r"train.freeze\[0\] = 'shared': matches no parameter of the model"):
        freezing(separate, ("shared",))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("shared", "stage.1"), r"train.freeze\[1\] = 'stage.1': matches no parameter.* Did you mean 'stages.1'\?"),
        (("stages.3",), r"train.freeze\[0\] = 'stages.3'"),
        (("zzz",), r"Choose from: shared, stages.0, stages.1, stages.2\."),
        (("stages", "shared"), r"train.freeze = \['stages', 'shared'\]: leaves nothing to train"),
        (("*",), r"leaves nothing to train"),
    ],
)
def test_what_cannot_be_frozen(patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        freezing(MODEL, patterns)


@pytest.mark.parametrize(
    "patterns", [("shared",), ("stages.1",), ("shared", "stages.1.output_blocks.0"), ("*.in_layers.*", "stages.2")]
)
def test_costs_are_those_of_real_passes(patterns: tuple[str, ...]) -> None:
    """Every stage's samples through the whole model, whose graph nothing cuts."""
    found, model = freezing(MODEL, patterns), build_model(MODEL)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in found.names)
    counted = costs(MODEL, (SIZE, SIZE), freeze=patterns)
    full = costs(MODEL, (SIZE, SIZE))
    trace = trace_model(
        MODEL, (SIZE, SIZE), 1, torch.float32, ActivationCheckpointingConfig(), on_gpus=False, freeze=patterns
    )
    assert counted.trained_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for k in range(3):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, SIZE, SIZE), torch.rand(1), torch.tensor([k])).sum().backward()
        assert counted.step_macs_K[k] == pytest.approx(counter.get_total_flops() / 6, abs=2)
        of_trace = (part.kernels.flops_N2 @ [1, 1] for part in (trace.shared, trace.stages[k]))
        assert sum(flops.sum() for flops in of_trace) == counter.get_total_flops()
        assert counted.decoders[k].macs == full.decoders[k].macs, "the forward pass is as it was"
    if "shared" in patterns:
        assert counted.encoder.step_macs == full.encoder.macs // 3, "forward alone"
        memory = trace.shared.memory(4)
        assert memory.outputs == 0, "no gradients come back to the encoder"
        assert (
            memory.kept
            < trace_model(MODEL, (SIZE, SIZE), 1, torch.float32, ActivationCheckpointingConfig(), on_gpus=False)
            .shared.memory(4)
            .kept
        )
    if patterns == ("stages.1",):
        assert 0.6 < counted.decoders[1].step_macs / full.decoders[1].macs < 0.7, "forward, and gradients of inputs"
