"""Weights and what describes them: safetensors, numpy's and torch's containers, indexes, exports, checkpoints."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save

from msdiff_dist.checkpoint.layout import INDEX, CheckpointIndex, parse_key
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.checkpoint.tensor_file import StoredFile, TensorReader
from msdiff_dist.config import to_mapping
from msdiff_dist.convert.tensor_sources import open_shards
from msdiff_dist.diffusion.config import StagesConfig
from msdiff_dist.errors import CheckpointError, UserError
from msdiff_dist.evaluation.feature_classifier import (
    ClassifierInfo,
    FeatureClassifier,
    load_classifier,
    save_classifier,
)
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.export.weights import open_weights
from msdiff_dist.files.safetensors_header import HeaderError, read_header
from msdiff_dist.models.ldm.config import LDMConfig

from ..mutations import mutate_json, mutate_safetensors
from ..target import DisagreementError, Target
from .containers import touch
from .data import json_hostile

_TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(2, dtype=torch.bfloat16), "empty": torch.empty(0, 4)}


def _safetensors(header: str, tail: bytes = b"") -> bytes:
    return (
        len(header.encode("utf-8", "surrogatepass")).to_bytes(8, "little")
        + header.encode("utf-8", "surrogatepass")
        + tail
    )


def _safetensors_hostile() -> dict[str, bytes]:
    one = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    return {
        "deep": _safetensors("[" * 100_000),
        "deep inside": _safetensors(one + ',"b":' + "[" * 30_000 + "]" * 30_000 + "}", bytes(4)),
        "name twice": _safetensors(one + "," + one[1:] + "}", bytes(4)),
        "field twice": _safetensors('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "long number": _safetensors('{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % ("9" * 5000), bytes(4)),
        "zeros before a number": _safetensors('{"a":{"dtype":"F32","shape":[01],"data_offsets":[0,4]}}', bytes(4)),
        "not a number": _safetensors(one + ',"b":NaN}', bytes(4)),
        "byte-order mark": _safetensors("\ufeff" + one + "}", bytes(4)),
        "half a pair": _safetensors('{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "not UTF-8": _safetensors('{"\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "many elements, none of them": _safetensors(
            '{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}'
        ),
        "gap": _safetensors('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
        "more bytes": _safetensors(one + "}", bytes(5)),
        "long header": (1 << 62).to_bytes(8, "little") + b"{}",
        "spaces before": _safetensors(" " + one + "}", bytes(4)),
        "metadata of numbers": _safetensors('{"__metadata__":{"a":1}}'),
        "100000 axes": _safetensors(
            '{{"a":{{"dtype":"U8","shape":[{}],"data_offsets":[0,1]}}}}'.format(",".join(["1"] * 100_000)), bytes(1)
        ),
    }


def _read_safetensors(data: bytes, folder: Path) -> Any:
    header = read_header(io.BytesIO(data).read, len(data))
    path = folder / "x.safetensors"
    path.write_bytes(data)
    reader = TensorReader(path)
    tensors = {name: reader.tensor(name) for name in reader.like}
    reader.mapped()
    return header, tensors


def _as_library(data: bytes, found: Any) -> None:
    header, tensors = found
    try:
        theirs = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except Exception as e:
        raise DisagreementError(f"safetensors refuses: {type(e).__name__} {e}") from e
    if theirs.keys() != tensors.keys():
        raise DisagreementError(f"names: {list(tensors)} where safetensors has {list(theirs)}")
    for name, their in theirs.items():
        place = header.tensors[name]
        ours = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if (list(their["shape"]), their["dtype"], bytes(their["data"])) != (list(place.shape), place.dtype, ours):
            raise DisagreementError(f"tensor: {name} is {place} where safetensors has {their!r:.300}")


def _shards() -> bytes:
    return json.dumps(
        {"metadata": {"total_size": 24}, "weight_map": {"a": "0.safetensors", "b": "1.safetensors"}}
    ).encode()


def _read_shards(data: bytes, folder: Path) -> Any:
    (folder / "0.safetensors").write_bytes(save({"a": torch.ones(3)}))
    (folder / "1.safetensors").write_bytes(save({"b": torch.ones(3)}))
    path = folder / "model.safetensors.index.json"
    path.write_bytes(data)
    return touch(open_shards(path))


_MODEL = LDMConfig(
    encoder_channels=8, decoder_channels=(8, 8), channel_mult=(1, 2), num_res_blocks=1, attention_downsamples=(2,),
    num_head_channels=8, norm_groups=4,
)  # fmt: skip


def _description() -> bytes:
    description = ModelDescription(
        model=_MODEL, stages=StagesConfig(boundaries=(500.0,)), sample_size=8, step=3, weights="ema"
    )
    return json.dumps(to_mapping(description)).encode()


def _read_description(data: bytes, folder: Path) -> Any:
    (folder / "config.json").write_bytes(data)
    (folder / "model.safetensors").write_bytes(save(_TENSORS))
    description = open_weights(folder).description
    description.process()
    description.partition()
    return description


def _recipe() -> dict[str, Any]:
    from msdiff_dist.recipe import load_recipe, recipe_mapping

    return recipe_mapping(load_recipe(Path(__file__).parents[3] / "recipes/debug.yaml"))


_PARTS = save({"param/a@0": torch.ones(3), "param/b@0": torch.ones(2), "param/b@2": torch.ones(2)})


def _checkpoint() -> bytes:
    index = CheckpointIndex(
        step=3,
        batch_size=4,
        loss=1.5,
        recipe=_recipe(),
        shapes={"a": (3,), "b": (2, 2)},
        moments=["exp_avg"],
        world_size=1,
        files=[
            StoredFile(
                name="rank_00000.safetensors",
                size=len(_PARTS),
                sha256="0" * 64,
                keys={"param/a@0": 3, "param/b@0": 2, "param/b@2": 2},
            )
        ],
        data=[["x", "y"]],
    )
    return index.dump().encode()


def _read_checkpoint(data: bytes, folder: Path) -> Any:
    (folder / "rank_00000.safetensors").write_bytes(_PARTS)
    (folder / INDEX).write_bytes(data)
    reader = CheckpointReader(folder)
    for name in reader.names():
        reader.tensor("param", name)
    for stored in reader.index.files:
        for key in stored.keys:
            parse_key(key)
    return reader


def _classifier() -> bytes:
    path = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / "msdiff-fuzz-classifier.safetensors"
    save_classifier(
        FeatureClassifier(ClassifierInfo(image_shape=(1, 8, 8), classes=2, channels=(2, 2), features=4)), path
    )
    data = path.read_bytes()
    path.unlink()
    return data


def _read_classifier(data: bytes, folder: Path) -> Any:
    path = folder / "classifier.safetensors"
    path.write_bytes(data)
    return load_classifier(path)


def _clean(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


TARGETS = (
    Target(
        name="safetensors",
        read=_read_safetensors,
        seeds=lambda: [save(_TENSORS), save(_TENSORS, {"a": "é"}), save({})],
        hostile=_safetensors_hostile,
        mutate=mutate_safetensors,
        refuses=(HeaderError, CheckpointError),
        oracle=_as_library,
        largest=1 << 12,
    ),
    Target(
        name="weight-map",
        read=_read_shards,
        seeds=lambda: [_shards()],
        mutate=mutate_json,
        refuses=(CheckpointError,),
        hostile=lambda: {**json_hostile(_shards()), "long name": b'{"weight_map": {"a": "' + b"x" * 300 + b'"}}'},
        largest=1 << 12,
    ),
    Target(
        name="export",
        read=_read_description,
        seeds=lambda: [_description()],
        hostile=lambda: json_hostile(_description()),
        mutate=mutate_json,
        refuses=(UserError,),
        largest=1 << 13,
    ),
    Target(
        name="checkpoint",
        read=_read_checkpoint,
        seeds=lambda: [_checkpoint()],
        hostile=lambda: json_hostile(_checkpoint()),
        mutate=mutate_json,
        refuses=(CheckpointError,),
        largest=1 << 14,
    ),
    Target(
        name="classifier",
        read=_read_classifier,
        seeds=lambda: [_classifier()],
        mutate=mutate_safetensors,
        refuses=(CheckpointError,),
        largest=1 << 14,
    ),
)
