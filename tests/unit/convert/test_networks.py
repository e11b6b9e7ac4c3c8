"""Weights are found wherever trainers keep them, averages are told from last ones, and several are asked about."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from msdiff_dist.convert.conversion import convert
from msdiff_dist.convert.networks import Wanted
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.convert.tensor_sources import open_source
from msdiff_dist.errors import CheckpointError
from tests.unit.convert.convert_helpers import export_tensors
from tests.unit.convert.formats.test_ldm import CLASSES, ldm_state

State = dict[str, Tensor]
RAW: State = {"input_blocks.0.0.weight": torch.arange(4.0), "out.2.bias": torch.ones(2)}
AVERAGED: State = {k: v + 1 for k, v in RAW.items()}


class AttributeDict(dict[str, Any]):
    """As Lightning's hyper-parameters and easydict are."""


class Trainer:
    """An object of a class that the reader does not have."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class Average(nn.Module):
    """A module with the network and its average inside."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.ema_model = network(RAW), network(AVERAGED)


def network(state: State) -> nn.Module:
    """A module whose state dict is `state`."""
    top = nn.Module()
    for name, value in state.items():
        *places, last = name.split(".")
        at = top
        for place in places:
            if place not in at._modules:
                at.add_module(place, nn.Module())
            at = at.get_submodule(place)
        at.register_parameter(last, nn.Parameter(value.clone()))
    return top


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


def read(path: Path, **wanted: Any) -> State:
    source = open_source(path, Wanted(**wanted))
    return {name: source.read(name) for name in source.names()}


ALONE: dict[str, Callable[[State], Any]] = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 1},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}},
    "module": lambda s: {"module": s, "dp_world_size": 2},
    "net": lambda s: {"net": s},
    "deep": lambda s: {"state_dict": {"model": s}, "args": types.SimpleNamespace(lr=1)},
    "checkpoint of a trainer": lambda s: {"trainer": Trainer(model=s)},
    "attributes": lambda s: AttributeDict(weights=AttributeDict(s)),
    "ordered": lambda s: collections.OrderedDict(model=collections.OrderedDict(s)),
    "parameters": lambda s: {"model": {k: nn.Parameter(v) for k, v in s.items()}},
    "arrays": lambda s: {"model": {k: v.numpy() for k, v in s.items()}},
    "whole module": network,
    "module inside": lambda s: {"model": network(s), "epoch": np.int64(3)},
    "DDP": lambda s: {"model": under("module.", s)},
    "compiled": lambda s: under("_orig_mod.", s),
    "both": lambda s: {"state_dict": under("module._orig_mod.", s)},
    "Lightning": lambda s: {"state_dict": under("model.", s), "pytorch-lightning_version": "2.5", "callbacks": {}},
    "Lightning, DeepSpeed": lambda s: {"module": under("_forward_module.model.", s)},
    "FSDP": lambda s: under("_fsdp_wrapped_module.", s),
    "parts compiled": lambda s: {k.replace(".0.weight", "._orig_mod.0.weight"): v for k, v in s.items()},
    "parts checkpointed": lambda s: {k.replace(".0.", ".0._checkpoint_wrapped_module."): v for k, v in s.items()},
    "unet": lambda s: {"state_dict": under("unet.", s)},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", list(ALONE))
def test_wrappings_of_one_network(tmp_path: Path, kind: str, legacy: bool) -> None:
    torch.save(ALONE[kind](RAW), tmp_path / "x.ckpt", _use_new_zipfile_serialization=not legacy)
    assert same(read(tmp_path / "x.ckpt"), RAW)


BOTH: dict[str, Callable[[], Any]] = {
    "model, ema": lambda: {"model": RAW, "ema": AVERAGED},
    "model, model_ema": lambda: {"model": RAW, "model_ema": AVERAGED},
    "params, params_ema": lambda: {"params": RAW, "params_ema": AVERAGED},
    "state_dict, ema_state_dict": lambda: {"state_dict": RAW, "ema_state_dict": AVERAGED},
    "inside": lambda: {"state_dict": {"model": RAW, "ema": AVERAGED}},
    "unet, unet_ema": lambda: {"unet": RAW, "unet_ema": AVERAGED},
    "objects": lambda: {"model": network(RAW), "ema": network(AVERAGED)},
    "one object": Average,
    "shadow": lambda: {"model": RAW, "ema": Trainer(decay=0.999, shadow=AVERAGED)},
    "bare and ema.": lambda: {**RAW, **under("ema.", AVERAGED)},
    "model. and ema.": lambda: {"state_dict": {**under("model.", RAW), **under("ema.", AVERAGED)}},
    "net. and ema_model.": lambda: {"state_dict": {**under("net.", RAW), **under("ema_model.module.", AVERAGED)}},
    "model. and model_ema.": lambda: {**under("model.", RAW), **under("model_ema.", AVERAGED)},
    "ema_pytorch": lambda: {
        "initted": torch.tensor(True), "step": torch.tensor(5), **under("online_model.", RAW),
        **under("ema_model.", AVERAGED),
    },
    "AveragedModel": lambda: {
        "model": RAW, "averaged_model": {"n_averaged": torch.tensor(3), **under("module._orig_mod.", AVERAGED)},
    },
    "stacked": lambda: {
        "state_dict": {**under("module._orig_mod.model.", RAW), **under("module._orig_mod.ema.", AVERAGED)},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", list(BOTH))
def test_averaged_and_last_weights(tmp_path: Path, kind: str) -> None:
    torch.save(BOTH[kind](), tmp_path / "x.pt")
    assert same(read(tmp_path / "x.pt"), AVERAGED)
    assert same(read(tmp_path / "x.pt", weights="ema"), AVERAGED)
    assert same(read(tmp_path / "x.pt", weights="raw"), RAW)
    source = open_source(tmp_path / "x.pt")
    assert source.taken is not None
    assert source.taken.averaged
    (other,) = source.taken.others
    assert same(read(tmp_path / "x.pt", key=other), RAW)


def test_wrappings_in_safetensors(tmp_path: Path) -> None:
    save_file({**under("module.", RAW), **under("module.ema.", AVERAGED)}, tmp_path / "x.safetensors")
    assert same(read(tmp_path / "x.safetensors"), AVERAGED)
    assert same(read(tmp_path / "x.safetensors", weights="raw"), RAW)
    save_file(under("_orig_mod.", RAW), tmp_path / "y.safetensors")
    assert same(read(tmp_path / "y.safetensors"), RAW)
    (tmp_path / "y.safetensors").rename(tmp_path / "y.pt")
    assert same(read(tmp_path / "y.pt"), RAW)


def test_several_networks_are_named(tmp_path: Path) -> None:
    averages = {"ema_0.999": {**RAW}, "ema_0.9999": {**AVERAGED}}
    torch.save({"student": RAW, "teacher": AVERAGED, **averages}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"2 networks: ema_0\.999, ema_0\.9999.*--key"):
        read(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"2 networks: student, teacher.*--key"):
        read(tmp_path / "x.pt", weights="raw")
    with pytest.raises(CheckpointError, match="It has: student, teacher"):
        read(tmp_path / "x.pt", key="studnet")
    assert same(read(tmp_path / "x.pt", key="teacher"), AVERAGED)


def test_networks_of_other_formats_are_no_choice(tmp_path: Path) -> None:
    torch.save({"unet": RAW, "text_encoder": {"shared.weight": torch.ones(2)}}, tmp_path / "x.pt")
    assert same(read(tmp_path / "x.pt", format="ldm"), RAW)


def test_averages_alone(tmp_path: Path) -> None:
    torch.save({"params_ema": AVERAGED}, tmp_path / "x.pt")
    assert same(read(tmp_path / "x.pt"), AVERAGED)
    with pytest.raises(CheckpointError, match="averaged weights only"):
        read(tmp_path / "x.pt", weights="raw")


def test_what_is_left_is_accounted_for(tmp_path: Path) -> None:
    content = {"model": {**RAW, "note": "x"}, "ema": AVERAGED, "optimizer": {}, "epoch": 3}
    torch.save(content, tmp_path / "x.pt")
    assert open_source(tmp_path / "x.pt", Wanted(weights="raw")).left_out == {
        "ema": "not taken; model was",
        "optimizer": "state of the training, no weights",
        "epoch": "state of the training, no weights",
        "note": "no tensor",
    }
    torch.save(
        {"state_dict": {**under("model.", RAW), **under("ema.", AVERAGED), "steps": torch.ones(1)}}, tmp_path / "y.pt"
    )
    left = open_source(tmp_path / "y.pt").left_out
    assert left["model.out.2.bias"] == "of state_dict.model, which was not taken"
    assert left["steps"] == "outside the network state_dict.ema"


def test_names_that_wrappers_make_equal(tmp_path: Path) -> None:
    torch.save({**RAW, "input_blocks.0._orig_mod.0.weight": torch.zeros(4)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="without its wrappers"):
        read(tmp_path / "x.pt")


def test_modules_inside_themselves_end(tmp_path: Path) -> None:
    top = network(RAW)
    for _ in range(40):  # each holds the one before it twice
        outer = nn.Module()
        outer._modules |= {"a": top, "b": top}
        top = outer
    torch.save(top, tmp_path / "x.pt")
    assert len(open_source(tmp_path / "x.pt").names()) < 1 << 17


@pytest.mark.parametrize("weights", ["auto", "ema", "raw"])
def test_the_report_says_which_were_taken(tmp_path: Path, weights: Any) -> None:
    state = ldm_state(CLASSES)
    averaged = {k: v + 1 for k, v in state.items()}
    torch.save({"model": under("module.", state), "ema": under("module.", averaged)}, tmp_path / "x.ckpt")
    report = convert(tmp_path / "x.ckpt", tmp_path / "out", "ldm", "msdiff", ConvertOptions(weights=weights))
    assert report["description"]["weights"] == ("raw" if weights == "raw" else "ema")
    expected = (state if weights == "raw" else averaged)["model.diffusion_model.out.2.bias"]
    assert torch.equal(export_tensors(tmp_path / "out")["stages.0.out.2.bias"], expected)
    said = [line for line in report["assumed"] if line.startswith("weights: the averages at ema.module")]
    assert len(said) == (weights == "auto")
