"""The folder of one model, as diffusers and transformers write it: config.json and files of weights."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.convert.tensor_sources import SafetensorsSource, TensorSource, open_shards, open_source
from msdiff_dist.errors import CheckpointError
from msdiff_dist.files.json_text import parse_mapping

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""The file of weights that diffusers writes."""
OF_DIFFUSERS = ("diffusion_pytorch_model",)
"""How the names of diffusers' files of weights begin."""
OF_TRANSFORMERS = ("model", "pytorch_model")
"""How the names of transformers' files of weights begin."""


def weights_of(
    folder: Path, options: ConvertOptions | None = None, stems: Sequence[str] = OF_DIFFUSERS
) -> TensorSource:
    """The tensors of one model's folder, in whichever files diffusers or transformers writes them to.

    Of several variants the one of full precision is taken, and of `non_ema` weights only if the raw ones are asked for.

    Raises:
        CheckpointError: there are no such files.
    """
    variants = ["", ".fp16", ".bf16"]
    if options is not None and options.weights == "raw":
        variants.insert(0, ".non_ema")
    for variant, stem, suffix in itertools.product(variants, stems, (".safetensors", ".bin")):
        file = folder / f"{stem}{variant}{suffix}"
        # diffusers puts the variant of a sharded model at the end of the index's name.
        index = folder / f"{stem}{suffix}.index{variant}.json"
        if file.exists():
            return open_source(file)
        if index.exists():
            return open_shards(index)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(
            str(folder),
            [p.name for p in found],
            f"holds no {stems[0]}.safetensors",
            "Name a complete diffusers folder.",
        )
    return SafetensorsSource(found)


def json_of(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is missing, no JSON, or no object.
    """
    try:
        return parse_mapping(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(str(path), None, "is missing", "Name a complete diffusers folder.") from None
    except ValueError as e:
        raise CheckpointError(str(path), None, str(e), "Fetch the folder again.") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, and the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
