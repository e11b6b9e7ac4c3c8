"""Recognises the format of a checkpoint by its tensors' names, to say clearly why another one cannot be read."""

from __future__ import annotations

from collections.abc import Iterable

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
