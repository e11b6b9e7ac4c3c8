"""xformers beside the torch of constraints.txt: it loads, and has operators for what the shipped recipes compute."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from msdiff_dist.errors import ConfigError
from msdiff_dist.models.attention import attention, check_attention
from msdiff_dist.models.multistage_unet import build_parts
from msdiff_dist.models.xformers_attention import check_installation, check_operators
from msdiff_dist.recipe import load_recipe

ROOT = Path(__file__).parents[3]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GPUS = {"A100": (8, 0), "H100": (9, 0)}

pinned_versions = pytest.mark.skipif(
    torch.__version__.partition("+")[0] != PINS["torch"] or version("xformers") != PINS["xformers"],
    reason="other versions of torch and xformers than in constraints.txt",
)


def package() -> Path:
    """The folder of the installed xformers, found without importing it."""
    spec = find_spec("xformers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Let xformers' choice of operators, which computes nothing, ask about a GPU that is not here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.skipif(version("xformers") != PINS["xformers"], reason="another xformers than in constraints.txt")
def test_the_pinned_xformers_was_built_for_the_pinned_torch() -> None:
    built = json.loads((package() / "cpp_lib.json").read_text())["version"]
    assert built["torch"].partition("+")[0] == PINS["torch"]
    runtime = next(PINS[name] for name in ("nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime") if name in PINS)
    assert runtime.split(".")[:2] == [str(built["cuda"] // 100), str(built["cuda"] % 100)]


@pinned_versions
def test_its_extension_loads_and_says_nothing() -> None:
    script = "import xformers.ops; from xformers import _cpp_lib; print(_cpp_lib._built_with_cuda)"
    ended = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("True\n", "")
    check_installation("cuda")


@pinned_versions
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_it_has_operators_for_the_shipped_recipes(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, dtype: torch.dtype, gpu: str
) -> None:
    model = load_recipe(recipe, []).model
    with torch.device("meta"):
        shared, stages = build_parts(
            dataclasses.replace(model, attention_backend="xformers"), range(len(model.decoder_channels))
        )
    on_gpu(monkeypatch, GPUS[gpu])
    check_attention((shared, *stages.values()), dtype, torch.device("cuda"))


@pinned_versions
def test_a_missing_operator_is_refused_with_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (9, 0))
    # Eight bf16 numbers fill the 16 bytes that the kernels load at once.
    with pytest.raises(
        ConfigError, match=r"no operator for torch.bfloat16 on cuda with 12 channels per head.*% 8 != 0"
    ):
        check_operators([32, 12], torch.bfloat16, torch.device("cuda"))
    on_gpu(monkeypatch, (10, 0))
    check_operators([32], torch.bfloat16, torch.device("cuda"))
    with pytest.raises(ConfigError, match="cutlassF-pt: requires device with capability <="):
        check_operators([32], torch.float32, torch.device("cuda"))


def test_only_layers_that_ask_for_xformers_are_checked() -> None:
    model = load_recipe(ROOT / "recipes/quickstart.yaml", []).model
    shared, stages = build_parts(model, [0])
    check_attention((shared, *stages.values()), torch.float32, torch.device("cpu"))
    _, stages = build_parts(dataclasses.replace(model, attention_backend="xformers"), [0])
    with pytest.raises(ConfigError, match="xformers computes on GPUs only, and this run computes on cpu"):
        check_attention(stages.values(), torch.float32, torch.device("cpu"))


def test_without_an_operator_the_call_is_refused() -> None:
    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(ConfigError, match=r"no operator for torch.float32 on cpu") as refused:
        attention(x, x, x, "xformers")
    assert refused.value.field == "model.attention_backend"


@pytest.mark.parametrize(
    ("extension", "said"),
    [
        (None, ["it was installed without its CUDA extension"]),
        (b"no library", ["does not load beside torch " + torch.__version__, "it was built for torch "]),
    ],
)
def test_an_extension_that_does_not_load_is_refused(tmp_path: Path, extension: bytes | None, said: list[str]) -> None:
    """The installed package with another extension in it, found earlier on the path."""
    (tmp_path / "xformers").mkdir()
    for part in package().iterdir():
        if part.suffix != ".so":
            (tmp_path / "xformers" / part.name).symlink_to(part)
    if extension is not None:
        (tmp_path / "xformers" / "_C.so").write_bytes(extension)
    refused = _refusal(tmp_path)
    assert all(words in refused for words in said), refused


def test_a_package_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers/__init__.py").write_text("raise RuntimeError('torn')")
    assert "it cannot be imported (RuntimeError: torn)" in _refusal(tmp_path)


def _refusal(first_on_path: Path) -> str:
    """What a process prints that finds its packages in this folder first, and checks xformers for GPUs."""
    script = """
from msdiff_dist.errors import ConfigError
from msdiff_dist.models.xformers_attention import check_installation
try:
    check_installation("cuda")
except ConfigError as e:
    print(e)
"""
    env = {**os.environ, "PYTHONPATH": f"{first_on_path}:{ROOT}"}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return ended.stdout
