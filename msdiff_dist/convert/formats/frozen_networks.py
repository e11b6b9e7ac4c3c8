"""The frozen networks of a text-to-image or latent pipeline: autoencoder, text encoder and tokenizer.

A conversion carries them without change: from a diffusers folder, from an export, or from where the description of a
run says that they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from msdiff_dist.convert.formats.model_folder import OF_TRANSFORMERS, WEIGHTS, json_of, weights_of, write_json
from msdiff_dist.convert.model_weights import AutoencoderWeights, ModelWeights, TextEncoderWeights, Written
from msdiff_dist.convert.tensor_sources import TensorSource
from msdiff_dist.convert.writing import write_safetensors
from msdiff_dist.errors import CheckpointError

AUTOENCODER, TEXT = "autoencoder", "text"
"""The folders of an export that hold the autoencoder, and the text encoder with its tokenizer."""
TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
"""The folders of the two in a pipeline, and inside `TEXT`."""
_TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
_TEXT_WEIGHTS = "model.safetensors"


def read_autoencoder(folder: Path) -> AutoencoderWeights:
    """Open the folder of an AutoencoderKL or VQModel.

    Raises:
        CheckpointError: a file is missing, or the class or a setting is another one's.
    """
    config = json_of(folder / "config.json")
    if config.get("_class_name") not in ("AutoencoderKL", "VQModel"):
        raise CheckpointError(
            f"{folder.name}/config.json", config.get("_class_name"), "is no autoencoder that this package has",
            "Convert the U-Net's folder alone.",
        )  # fmt: skip
    if config.get("shift_factor"):
        raise CheckpointError(
            f"{folder.name}/config.json", config["shift_factor"], "(shift_factor) moves latents, as no model here does",
            "Convert a model whose autoencoder scales latents alone.",
        )  # fmt: skip
    return AutoencoderWeights(config["_class_name"], config, weights_of(folder))


def read_text_encoder(folder: Path) -> TextEncoderWeights:
    """Open the text encoder and the tokenizer in a folder that holds `text_encoder` and `tokenizer`.

    Raises:
        CheckpointError: one of the two is missing, or the text encoder is no CLIPTextModel.
    """
    for part in (TEXT_ENCODER, TOKENIZER):
        if not (folder / part).is_dir():
            raise CheckpointError(
                str(folder), None, f"has no folder {part}",
                f"Copy {TEXT_ENCODER} and {TOKENIZER} of the model that it was made from into it.",
            )  # fmt: skip
    config = json_of(folder / TEXT_ENCODER / "config.json")
    classes = config.get("architectures") or ["CLIPTextModel"]
    if classes != ["CLIPTextModel"]:
        raise CheckpointError(
            f"{TEXT_ENCODER}/config.json", ", ".join(classes), "is no text encoder that this package has",
            "Convert a model whose text encoder is a CLIPTextModel, as that of Stable Diffusion 1 and 2 is.",
        )  # fmt: skip
    found = (p for pattern in _TOKENIZER_FILES for p in (folder / TOKENIZER).glob(pattern))
    files = tuple(sorted(p for p in found if p.is_file()))
    if not {"tokenizer.json", "vocab.json"} & {p.name for p in files}:
        raise CheckpointError(
            str(folder / TOKENIZER), None, "has neither vocab.json nor tokenizer.json", "Copy the folder again."
        )
    length = config.get("max_position_embeddings", 77)
    settings = json_of(folder / TOKENIZER / "tokenizer_config.json") if _has(files, "tokenizer_config.json") else {}
    return TextEncoderWeights(
        config=config,
        tensors=weights_of(folder / TEXT_ENCODER, stems=OF_TRANSFORMERS),
        tokenizer=files,
        context_shape=(int(min(length, settings.get("model_max_length") or length)), config.get("hidden_size", 512)),
    )


def with_described_networks(found: ModelWeights) -> ModelWeights:
    """The same weights with the frozen networks in the folders that the description names, where there are such.

    Raises:
        CheckpointError: such a folder is incomplete.
    """
    codec, text = found.description.autoencoder, found.description.text_encoder
    used = dict(found.used)
    vae = read_autoencoder(Path(codec.path)) if codec.path and Path(codec.path).is_dir() else None
    encoder = read_text_encoder(Path(text.name)) if text and text.kind == "clip" and Path(text.name).is_dir() else None
    if vae:
        used |= {f"{AUTOENCODER}/{k}": [f"{AUTOENCODER}/{k}"] for k in vae.tensors.names()}
    if encoder:
        used |= {f"{TEXT_ENCODER}/{k}": [f"{TEXT_ENCODER}/{k}"] for k in encoder.tensors.names()}
    return replace(found, autoencoder_weights=vae, text_encoder_weights=encoder, used=used)


def write_frozen(
    weights: ModelWeights, autoencoder: Path, text: Path, root: Path, written: Written, metadata: Mapping[str, str]
) -> None:
    """Write the frozen networks that the model brings, and add them to `written`.

    Args:
        autoencoder: new folder of the autoencoder.
        text: folder in which those of text encoder and tokenizer are made.
        root: the folder that names in `written` are relative to.
    """
    vae, encoder = weights.autoencoder_weights, weights.text_encoder_weights
    if vae is not None:
        _write_network(vae.config, vae.tensors, autoencoder / WEIGHTS, AUTOENCODER, root, written, metadata)
    if encoder is not None:
        file = text / TEXT_ENCODER / _TEXT_WEIGHTS
        _write_network(encoder.config, encoder.tensors, file, TEXT_ENCODER, root, written, metadata)
        (text / TOKENIZER).mkdir(parents=True)
        for path in encoder.tokenizer:
            shutil.copy(path, text / TOKENIZER)


def _write_network(
    config: dict[str, Any],
    tensors: TensorSource,
    file: Path,
    ours: str,
    root: Path,
    written: Written,
    metadata: Mapping[str, str],
) -> None:
    write_json(file.parent / "config.json", config)
    written.files[str(file.relative_to(root))] = write_safetensors(file, tensors, metadata)
    folder = file.parent.relative_to(root)
    written.names |= {f"{ours}/{k}": [f"{folder}/{k}"] for k in tensors.names()}


def _has(files: tuple[Path, ...], name: str) -> bool:
    return any(p.name == name for p in files)
