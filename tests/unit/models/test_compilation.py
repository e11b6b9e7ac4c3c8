"""Compiled encoders and decoders compute what the plain ones do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from msdiff_dist.errors import ConfigError
from msdiff_dist.models import LDMConfig, ModelConfig, SongConfig, build_model
from msdiff_dist.models.compilation import check_compiler, compile_part, keep_compiled_code
from msdiff_dist.recipe import load_recipe

SMALL = {"encoder_channels": 16, "decoder_channels": (8,), "channel_mult": (1, 2), "num_res_blocks": 1}
MODELS: list[ModelConfig] = [
    LDMConfig(**SMALL, attention_downsamples=(2,), num_head_channels=8, norm_groups=4, use_scale_shift_norm=True),
    SongConfig(**SMALL, family="ncsnpp_vp", attention_downsamples=(2,), augment_labels=2),
]


@pytest.mark.parametrize("config", MODELS, ids=["ldm", "ncsnpp_vp"])
def test_each_part_is_one_graph(config: ModelConfig) -> None:
    model = build_model(config)
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    leaves = [f.detach().requires_grad_() for f in model.shared(*inputs)]
    for part, arguments in ((model.shared, inputs), (model.stages[0], leaves)):
        torch._dynamo.reset()
        found = torch._dynamo.explain(part.forward)(*arguments)
        assert found.graph_count == 1, found.break_reasons


@pytest.mark.slow  # on one core the compiler takes minutes
@pytest.mark.parametrize("config", MODELS, ids=["ldm", "ncsnpp_vp"])
def test_compiled_is_eager(config: ModelConfig) -> None:
    """Output and gradients to 1e-5, with the names of parameters unchanged."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    names = list(model.state_dict())
    x_BCHW = torch.randn(2, 3, 8, 8, generator=generator)
    t_B = torch.tensor([3, 700])

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        features = model.shared(x_BCHW, t_B)
        leaves = [f.detach().requires_grad_() for f in features]  # the graph is cut here, as in training
        output = model.stages[0](*leaves)
        output.square().sum().backward()
        torch.autograd.backward(features, [leaf.grad for leaf in leaves])
        return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    eager = step()
    check_compiler()
    for part in (model.shared, model.stages[0]):
        compile_part(part)
    compiled = step()
    assert list(model.state_dict()) == names
    assert len(compiled) == len(eager)
    scale = max(float(g.norm()) for g in eager[1:])
    for a, b in zip(compiled, eager, strict=True):
        assert (a - b).norm() <= 1e-5 * max(float(b.norm()), 1e-2 * scale)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("parallel.zero_shared=3", "parallel.zero_shared"),
        ("activation_checkpointing.decoders=true", "activation_checkpointing.decoders"),
    ],
)
def test_what_cannot_be_compiled_is_refused(override: str, field: str) -> None:
    load_recipe("recipes/debug.yaml", [override])
    with pytest.raises(ConfigError, match=r"train\.compile") as refused:
        load_recipe("recipes/debug.yaml", [override, "train.compile=true"])
    assert refused.value.field == field


def test_a_machine_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        check_compiler()


def test_the_place_for_compiled_code_is_the_users_or_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # restored afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert cache_dir() == default_cache_dir(), "torch sets the variable itself"
    keep_compiled_code(tmp_path / "compiled")
    assert cache_dir() == str(tmp_path / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "shared"))
    keep_compiled_code(tmp_path / "compiled")
    assert cache_dir() == str(tmp_path / "shared")
