"""Recognises the format of a checkpoint by its tensors' names, to say clearly why another one cannot be read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from msdiff_dist.errors import CheckpointError

# Networks that this package does not have, and beginnings of names that only they have.
_OTHERS = (
    ("Stable Diffusion XL", ("conditioner.embedders.", "model.diffusion_model.label_emb.0.", "add_embedding.")),
    ("Flux", ("double_blocks.", "model.diffusion_model.double_blocks.", "single_transformer_blocks.")),
    ("Stable Diffusion 3", ("joint_blocks.", "model.diffusion_model.joint_blocks.", "context_embedder.")),
    ("a diffusion transformer", ("transformer_blocks.", "blocks.0.attn.", "x_embedder.")),
    ("a ControlNet", ("control_model.", "controlnet_cond_embedding.")),
    ("a LoRA", ("lora_unet_", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora")),
)


def format_of(keys: Iterable[str]) -> str | None:
    """Name of the format whose tensors are named so; None if no format's are."""
    from msdiff_dist.convert.formats import FORMATS  # here, since the readers in that table import this module

    names = list(keys)
    return next((name for name, known in FORMATS.items() if any(k.startswith(known.prefixes) for k in names)), None)


def format_at(path: Path) -> str | None:
    """The format of a file or folder of another program, as `--from` takes it; None if it is not recognised.

    Raises:
        CheckpointError: a file of weights cannot be read.
    """
    from msdiff_dist.convert.tensor_sources import PICKLES, open_source  # that module imports this one

    if path.is_dir():
        if (path / "latest").is_file() or any(path.glob("*_model_states.pt")):
            return "deepspeed"
        return "diffusers" if (path / "model_index.json").is_file() or (path / "config.json").is_file() else None
    if path.is_file() and path.suffix in (*PICKLES, ".safetensors", ".npz"):
        return format_of(open_source(path).names())
    return None


def begins_network(name: str) -> bool:
    """Whether a tensor's name is one by which a network is recognised, of this package or another one."""
    from msdiff_dist.convert.formats import FORMATS  # as above

    known = (*(format_.prefixes for format_ in FORMATS.values()), *(prefixes for _, prefixes in _OTHERS))
    return any(name.startswith(prefixes) for prefixes in known)


def refuse_other_formats(keys: Iterable[str], wanted: str) -> None:
    """Raise unless the names of a checkpoint's tensors are those of the `wanted` format.

    Raises:
        CheckpointError: they are not; it names the format or network that they belong to.
    """
    names = list(keys)
    for network, prefixes in _OTHERS:
        if any(k.startswith(prefixes) for k in names):
            raise CheckpointError(
                "--from", wanted, f"the checkpoint is {network}, a network that this package does not have",
                "Convert an LDM, Stable Diffusion 1 or 2, or multi-stage checkpoint.",
            )  # fmt: skip
    found = format_of(names)
    if found == wanted:
        return
    if found is None:
        problem = (
            "the checkpoint holds an autoencoder alone"
            if any(k.startswith(("encoder.", "decoder.", "quant_conv.")) for k in names)
            else f"no tensor has the name of a U-Net's (the first is {names[0] if names else 'none'})"
        )
        raise CheckpointError("--from", wanted, problem, "Name a checkpoint of a diffusion U-Net.")
    raise CheckpointError("--from", wanted, f"the checkpoint is of format {found}", f"Use --from {found}.")


# Folders that only pipelines without a network of this package have, with what they are.
_OTHER_FOLDERS = {
    "text_encoder_2": "Stable Diffusion XL or newer, whose network takes the embeddings of two text encoders",
    "transformer": "a diffusion transformer and no U-Net",
    "prior": "a prior for another pipeline",
}
_LORA = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_config.json")
# What U-Nets with more channels than the latents' four take beside them.
_MORE_INPUTS = {
    9: "an inpainting model, whose U-Net takes a mask and the latents of the masked image too",
    8: "an image-editing model, whose U-Net takes the latents of the image to edit too",
    7: "an upscaling model, whose U-Net takes the small image too",
    5: "a depth-to-image model, whose U-Net takes a depth map too",
}
_TEXT_TO_IMAGE = "Take a text-to-image model of Stable Diffusion 1 or 2."


def refuse_other_pipelines(folder: Path) -> None:
    """Raise if a diffusers folder holds a LoRA or a pipeline whose network this package does not have.

    Raises:
        CheckpointError: it does; the error names it.
    """
    if any((where / name).is_file() for where in (folder, folder / "unet") for name in _LORA):
        raise CheckpointError(
            "SRC", str(folder), "holds a LoRA, which is a change of another model's weights",
            "Apply it in diffusers (load_lora_weights, fuse_lora) and take what save_pretrained then writes.",
        )  # fmt: skip
    for name, what in _OTHER_FOLDERS.items():
        if (folder / name).is_dir():
            raise CheckpointError("SRC", str(folder), f"holds {what}", _TEXT_TO_IMAGE)


def refuse_other_inputs(unet: Mapping[str, Any]) -> None:
    """Raise if a U-Net of diffusers takes inputs that this package's networks do not.

    Args:
        unet: its config.json.

    Raises:
        CheckpointError: it does; the error names the model.
    """
    channels = unet.get("in_channels", 4)
    if unet.get("addition_embed_type") == "text_time":
        raise CheckpointError(
            "unet/config.json", "text_time", f"is of {_OTHER_FOLDERS['text_encoder_2']}", _TEXT_TO_IMAGE
        )
    if channels != unet.get("out_channels", 4) and channels in _MORE_INPUTS:
        raise CheckpointError("unet.in_channels", channels, f"is that of {_MORE_INPUTS[channels]}", _TEXT_TO_IMAGE)
