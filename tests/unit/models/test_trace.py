"""What a traced model allocates and computes, beside real passes measured by torch's profiler and counter."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from msdiff_dist.models import LDMConfig, ModelConfig, SongConfig
from msdiff_dist.models.activation_checkpointing import ActivationCheckpointingConfig, checkpoint_activations
from msdiff_dist.models.group_norm import GroupNorm
from msdiff_dist.models.multistage_unet import build_parts
from msdiff_dist.models.trace import ModelTrace, trace_model

LDM = LDMConfig(
    encoder_channels=16,
    decoder_channels=(16, 8),
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_downsamples=(2,),
    num_head_channels=8,
    norm_groups=8,
    context_dim=12,
    attention_backend="sdpa",
)
SONG = SongConfig(
    family="ncsnpp",
    encoder_channels=16,
    decoder_channels=(16, 8),
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_downsamples=(2,),
    num_classes=3,
    dropout=0.3,
)
KEEP = ActivationCheckpointingConfig()
RECOMPUTE = ActivationCheckpointingConfig(encoder=True, decoders=True)
ROWS, SIZE, TOKENS = 7, 32, 5


def traced(config: ModelConfig, checkpointing: ActivationCheckpointingConfig = KEEP) -> ModelTrace:
    return trace_model(config, (SIZE, SIZE), TOKENS, torch.float32, checkpointing, on_gpus=False)


def inputs_of(config: ModelConfig) -> list[Tensor | None]:
    return [
        torch.randn(ROWS, 3, SIZE, SIZE),
        torch.rand(ROWS),
        torch.randn(ROWS, TOKENS, config.context_channels) if config.context_channels else None,
        torch.zeros(ROWS, dtype=torch.int64) if config.takes_label else None,
        None,
    ]


def parts_of(config: ModelConfig, checkpointing: ActivationCheckpointingConfig) -> list[nn.Module]:
    shared, stages = build_parts(config, range(config.num_stages))
    parts = [shared, *stages.values()]
    for part in parts:
        checkpoint_activations(part, checkpointing)
        # As the engines do: gradients are added to a buffer that is there before.
        for p in part.parameters():
            p.grad = torch.zeros_like(p)
    return parts


def growth(action: Callable[[], object]) -> tuple[int, int, object]:
    """Bytes of torch's allocator at the peak of an action and after it, and what the action returned."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        result = action()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, live, result


# Kernels of the CPU allocate temporary memory of their own: a larger share where activations are recomputed.
@pytest.mark.parametrize(
    ("config", "checkpointing", "tolerance"),
    [
        (LDM, KEEP, 0.05),
        pytest.param(SONG, KEEP, 0.05, marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(LDM, share_encoder=False), KEEP, 0.05, marks=pytest.mark.slow),
        pytest.param(LDM, RECOMPUTE, 0.2, marks=pytest.mark.slow),
    ],
    ids=["ldm", "song", "separate", "recomputed"],
)
def test_memory_of_real_passes(
    config: ModelConfig, checkpointing: ActivationCheckpointingConfig, tolerance: float
) -> None:
    config = dataclasses.replace(config, num_res_blocks=2)
    shared, *stages = parts_of(config, checkpointing)
    trace = traced(config, checkpointing)

    predicted = trace.shared.memory(ROWS)
    peak, kept, features = growth(lambda: shared(*inputs_of(config)))
    # The real inputs are made inside.
    given = sum(t.nbytes for t in inputs_of(config) if t is not None)
    assert isinstance(features, tuple)
    if config.share_encoder:
        assert peak == pytest.approx(predicted.forward_peak + given, rel=tolerance)
        assert kept == pytest.approx(predicted.kept + given, rel=tolerance)

    for stage, of_stage in zip(stages, trace.stages, strict=True):
        leaves = [f.detach().requires_grad_(f.requires_grad) for f in features]

        def forward(stage: nn.Module = stage, leaves: list[Tensor] = leaves) -> Tensor:
            loss: Tensor = stage(*leaves).square().sum()
            return loss

        memory = of_stage.memory(ROWS)
        peak, kept, loss = growth(forward)
        assert peak == pytest.approx(memory.forward_peak, rel=tolerance)
        assert kept == pytest.approx(memory.kept, rel=tolerance)
        assert isinstance(loss, Tensor)
        peak, left, _ = growth(loss.backward)
        assert kept + peak == pytest.approx(memory.backward_peak, rel=tolerance)
        assert kept + left == pytest.approx(memory.left, rel=tolerance, abs=1e5)

    if config.share_encoder:
        outputs = [f for f in features if f.requires_grad]
        gradients = [torch.ones_like(f) for f in outputs]
        assert predicted.outputs == sum(g.nbytes for g in gradients)
        peak, left, _ = growth(lambda: torch.autograd.backward(outputs, gradients))
        assert predicted.kept + peak == pytest.approx(predicted.backward_peak, rel=tolerance)
        assert predicted.kept + left == pytest.approx(predicted.left, rel=tolerance)


def test_operations_of_real_passes() -> None:
    config = dataclasses.replace(LDM, attention_backend="math")
    shared, *stages = parts_of(config, KEEP)
    trace = traced(config)
    with FlopCounterMode(display=False) as counter:
        features = shared(*inputs_of(config))
        outputs = [f for f in features if f.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(f) for f in outputs])
    assert (trace.shared.kernels.flops_N2 @ [1, ROWS]).sum() == counter.get_total_flops()
    for stage, of_stage in zip(stages, trace.stages, strict=True):
        with FlopCounterMode(display=False) as counter:
            stage(*(f.detach().requires_grad_(f.requires_grad) for f in features)).square().sum().backward()
        assert (of_stage.kernels.flops_N2 @ [1, ROWS]).sum() == counter.get_total_flops()


def test_fused_attention_is_counted() -> None:
    fused, plain = traced(LDM), traced(dataclasses.replace(LDM, attention_backend="math"))
    for a, b in zip(fused.stages, plain.stages, strict=True):
        # The fused kernel computes the products of queries and keys once more in its backward pass.
        ratio = (a.kernels.flops_N2 @ [1, ROWS]).sum() / (b.kernels.flops_N2 @ [1, ROWS]).sum()
        assert 1 <= ratio < 1.1


def test_fused_norms_keep_their_input_alone() -> None:
    kept = {
        on_gpus: trace_model(LDM, (SIZE, SIZE), TOKENS, torch.float32, KEEP, on_gpus=on_gpus).stages[1].memory(ROWS)
        for on_gpus in (False, True)
    }
    # Every norm with SiLU saves one tensor of its size: without the fused kernel, SiLU keeps its input as well.
    shared, stages = build_parts(LDM, [1])
    normed: list[int] = []
    for module in stages[1].modules():
        if isinstance(module, GroupNorm) and module.silu:
            module.register_forward_hook(lambda _, __, out: normed.append(out.nbytes))
    stages[1](*shared(*inputs_of(LDM)))
    assert kept[False].kept - kept[True].kept == pytest.approx(sum(normed), rel=0.01)


def test_masks_of_dropout_take_one_byte_on_gpus() -> None:
    without = dataclasses.replace(SONG, dropout=0.0)
    kept = {
        (config.dropout, on_gpus): trace_model(config, (SIZE, SIZE), 1, torch.float32, KEEP, on_gpus=on_gpus)
        .stages[0]
        .memory(ROWS)
        .kept
        for config in (SONG, without)
        for on_gpus in (False, True)
    }
    # On a CPU a mask is as large as its input; both keep what they return.
    of_masks = {on_gpus: kept[SONG.dropout, on_gpus] - kept[0.0, on_gpus] for on_gpus in (False, True)}
    assert of_masks[True] < of_masks[False]
