"""Files of settings: recipes, cluster files, sweeps, ablations, and the configurations of other programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from msdiff_dist.apps.ablation.config import load_ablation
from msdiff_dist.config import to_mapping
from msdiff_dist.convert.conversion import convert
from msdiff_dist.convert.formats.diffusers_folder import read_diffusers
from msdiff_dist.convert.formats.ldm import read_ldm
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.convert.tensor_sources import open_source
from msdiff_dist.errors import ConfigError
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.files.text import read_text, read_yaml
from msdiff_dist.launch.cluster import load_cluster, one_rank
from msdiff_dist.launch.gres import gpus, parse_gres
from msdiff_dist.models import build_model
from msdiff_dist.models.ldm.config import LDMConfig
from msdiff_dist.recipe import load_recipe, recipe_mapping
from msdiff_dist.sweep import load_sweep, run_names

from ..mutations import mutate_json, mutate_lines
from ..target import Target
from .data import json_hostile

_ROOT = Path(__file__).parents[3]
_MODEL = LDMConfig(
    encoder_channels=32, decoder_channels=(32,), channel_mult=(1, 2), num_res_blocks=1, attention_downsamples=(2,),
    num_head_channels=32,
)  # fmt: skip


def _files(*patterns: str) -> Callable[[], list[bytes]]:
    return lambda: [path.read_bytes() for pattern in patterns for path in sorted(_ROOT.glob(pattern))]


def _yaml_hostile() -> dict[str, bytes]:
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    laughs += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    merged = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10)
    )
    return {
        "aliases of aliases": laughs.encode(),
        "merges of merges": merged.encode(),
        "alias of itself": b"name: &a [*a]\n",
        "mapping that holds itself": b"name: &a {b: *a}\n",
        "deep flow": b"name: " + b"[" * 20_000,
        "deep flow, closed": b"name: " + b"[" * 900 + b"]" * 900,
        "deep blocks": b"".join(b" " * i + b"a:\n" for i in range(300)),
        "deep sequences": b"- " * 5000 + b"a",
        "long number": b"name: " + b"9" * 5000,
        "long number of another base": b"name: 0x" + b"f" * 20000,
        "long sexagesimal number": b"name: 1" + b":59" * 5000,
        "no date": b"name: 2001-99-99",
        "no timestamp": b"name: !!timestamp x",
        "no number": b"name: !!int x\ntrain: !!float y",
        "no number at all": b"name: !!int ''",
        "no bool": b"name: !!bool x",
        "no binary": b"name: !!binary '%'",
        "bytes": b"name: !!binary aGVsbG8=",
        "date": b"name: 2001-01-01",
        "set": b"name: !!set {a, b}\ntrain: !!omap [a: 1]\nmodel: !!pairs [a: 1]",
        "an object": b"name: !!python/object/apply:os.system [x]",
        "unhashable key": b"? [a]\n: b\n? {c: d}\n: e\n",
        "keys of many types": b"1: a\n1.5: b\ntrue: c\nnull: d\n2001-01-01: e\n",
        "key twice": b"name: a\nname: b\n",
        "several documents": b"name: a\n---\nname: b\n",
        "equals sign": b"name: =\n",
        "unknown interpolation": b"name: ${a.b.c}\n",
        "interpolation of itself": b"name: ${name}\n",
        "broken interpolation": b"name: ${\ntrain: ${oc.env:}\n",
        "deep interpolation": b"name: " + b"${" * 300 + b"a" + b"}" * 300 + b"\n",
        "interpolations of interpolations": b"a0: xxxxxxxxxx\n"
        + b"".join(b"a%d: " % i + b"${a%d}" % (i - 1) * 10 + b"\n" for i in range(1, 10)),
        "environment": b"name: ${oc.env:HOME}\n",
        "number, not a mapping": b"5",
        "null": b"~",
        "empty": b"",
        "list": b"- a\n",
        "text": b"a",
        "byte-order mark": b"\xef\xbb\xbfname: a\n",
        "UTF-16": "name: a\n".encode("utf-16"),
        "not UTF-8": b"name: \xff\n",
        "zero bytes": b"name: \0\n",
        "control": b"name: \x1b\n",
        "tabs": b"name:\n\ta: b\n",
        "half a pair": b'name: "\\ud800"\n',
    }


def _written(name: str, read: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    def call(data: bytes, folder: Path) -> Any:
        path = folder / name
        path.write_bytes(data)
        return read(path)

    return call


def _recipe(path: Path) -> Any:
    return recipe_mapping(load_recipe(path))


def _cluster(path: Path) -> Any:
    cluster = load_cluster(str(path))
    return cluster.world_sizes, cluster.time_s, one_rank(cluster)


def _sweep(path: Path) -> Any:
    sweep = load_sweep(path)
    return None if sweep is None else (run_names(sweep.config.changes), sweep.overrides())


def _export(folder: Path) -> Path:
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=draw) for k, v in build_model(_MODEL).state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_mapping(ModelDescription(model=_MODEL, sample_size=8))))
    return folder


def _converted(format_: str, name: str) -> Callable[[Path], Path]:
    """The export in another format, made once in each scratch folder."""

    def make(folder: Path) -> Path:
        path = folder / name
        if not path.exists():
            convert(_export(folder / f"export-{name}"), path, "msdiff", format_)
        return path

    return make


_diffusers, _ldm = _converted("diffusers", "pipeline"), _converted("ldm", "x.safetensors")


def _diffusers_file(name: str) -> Target:
    def read(data: bytes, folder: Path) -> Any:
        pipeline = _diffusers(folder)
        path = pipeline / name
        valid = path.read_bytes()
        try:
            path.write_bytes(data)
            found = read_diffusers(pipeline, ConvertOptions())
            return to_mapping(found.description)
        finally:
            path.write_bytes(valid)

    def seeds() -> list[bytes]:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            return [(_diffusers(Path(folder)) / name).read_bytes()]

    label = f"diffusers-{Path(name).parent.name or 'index'}"
    return Target(
        name=label,
        read=read,
        seeds=seeds,
        hostile=lambda: json_hostile(seeds()[0]),
        mutate=mutate_json,
        largest=1 << 13,
    )


_SWEEP = b"""recipe: x.yaml
grid:
  optimizer.lr: [1e-4, 3e-4]
  train.seed: [0, 1]
runs:
  - {model.decoder_channels: [24, 16, 8], stages.boundaries: [442, 631]}
max_parallel: 2
"""
_LDM_YAML = b"""model:
  params:
    linear_start: 0.0015
    linear_end: 0.0195
    timesteps: 1000
    scale_factor: 0.3
    beta_schedule: linear
    parameterization: eps
    first_stage_config: {params: {ddconfig: {resolution: 64}}}
    unet_config:
      params:
        in_channels: 3
        out_channels: 3
        model_channels: 32
        attention_resolutions: [2]
        num_res_blocks: 1
        channel_mult: [1, 2]
        num_head_channels: 32
        image_size: 8
        stage_interval: [442, 631, 1000]
        de_nfs: [32]
"""


def _read_ldm_yaml(data: bytes, folder: Path) -> Any:
    source = open_source(_ldm(folder))
    path = folder / "ldm.yaml"
    path.write_bytes(data)
    return to_mapping(read_ldm(source, ConvertOptions(config=path)).description)


def _read_gres(data: bytes, folder: Path) -> Any:
    (folder / "gres").write_bytes(data)
    return gpus(parse_gres(read_text(folder / "gres", "gres")))


_WORDS = (
    b"gpu:a100:4",
    b"${oc.env:HOME}",
    b"&a ",
    b"*a",
    b"<<: *a",
    b"!!int",
    b"[1, 2]",
    b"{a: b}",
    b'"4-9999999999"',
    b"1-00:00:00",
    b"null",
    b".inf",
    b".nan",
    b"-1",
    b"1e400",
    b"0.5",
    b"true",
)


def _settings(name: str, read: Callable[[Path], Any], *patterns: str) -> Target:
    return Target(
        name=name,
        read=_written(f"{name}.yaml", read),
        seeds=_files(*patterns),
        hostile=_yaml_hostile,
        mutate=mutate_lines,
        words=_WORDS,
        largest=1 << 13,
    )


TARGETS = (
    _settings("yaml", lambda path: read_yaml(path, "FILE"), "recipes/debug.yaml"),
    _settings("recipe", _recipe, "recipes/*.yaml"),
    replace(_settings("cluster", _cluster, "slurm/*.yaml"), hostile=dict),
    replace(_settings("sweep", _sweep), seeds=lambda: [_SWEEP]),
    replace(_settings("ablation", lambda path: load_ablation(path, []), "recipes/ablations/*.yaml"), hostile=dict),
    Target(
        name="ldm-yaml",
        read=_read_ldm_yaml,
        seeds=lambda: [_LDM_YAML],
        hostile=_yaml_hostile,
        mutate=mutate_lines,
        words=_WORDS,
        largest=1 << 12,
    ),
    *map(_diffusers_file, ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")),
    Target(
        name="gres",
        read=_read_gres,
        refuses=(ValueError, ConfigError),
        mutate=mutate_lines,
        largest=1 << 12,
        words=_WORDS,
        seeds=lambda: [b"gpu:a100:4(S:0-1),lustre:1", b"(null)", b"gres/gpu:2,shard:8", b"gpu:v100:2(S:0,1),gpu:4"],
        hostile=lambda: {
            "long number": b"gpu:" + b"9" * 5000,
            "parentheses": b"gpu:1(" * 3000,
            "commas": b"," * 9000,
            "colons": b":" * 9000,
            "open": b"gpu(" + b"a,(" * 3000,
        },
    ),
)
