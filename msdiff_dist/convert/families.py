"""Whose checkpoint a set of names is, for a clear refusal of the ones this package has no model for."""

from __future__ import annotations

from collections.abc import Iterable

from msdiff_dist.errors import CheckpointError

_OTHERS = (
    ("Stable Diffusion XL", ("conditioner.embedders.", "model.diffusion_model.label_emb.0.", "add_embedding.")),
    ("Flux", ("double_blocks.", "model.diffusion_model.double_blocks.", "single_transformer_blocks.")),
    ("Stable Diffusion 3", ("joint_blocks.", "model.diffusion_model.joint_blocks.", "context_embedder.")),
    ("a diffusion transformer", ("transformer_blocks.", "blocks.0.attn.", "x_embedder.")),
    ("a ControlNet", ("control_model.", "controlnet_cond_embedding.")),
    ("a LoRA", ("lora_unet_", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora")),
)


def family_of(keys: Iterable[str]) -> str | None:
    """The format that the names belong to, or None."""
    from msdiff_dist.convert.formats import FORMATS  # whose readers ask here

    names = list(keys)
    return next((name for name, known in FORMATS.items() if any(k.startswith(known.marks) for k in names)), None)


def refuse_other_families(keys: Iterable[str], wanted: str) -> None:
    """Raise unless the names are of the `wanted` format.

    Raises:
        CheckpointError: naming what they are instead.
    """
    names = list(keys)
    for family, marks in _OTHERS:
        if any(k.startswith(marks) for k in names):
            raise CheckpointError(
                "--from", wanted, f"the checkpoint is {family}, a network that this package does not have",
                "Convert an LDM, Stable Diffusion 1 or 2, or multi-stage checkpoint.",
            )  # fmt: skip
    found = family_of(names)
    if found == wanted:
        return
    if found is None:
        what = (
            "the checkpoint holds an autoencoder alone"
            if any(k.startswith(("encoder.", "decoder.", "quant_conv.")) for k in names)
            else f"no tensor has the name of a U-Net's (the first is {names[0] if names else 'none'})"
        )
        raise CheckpointError("--from", wanted, what, "Name a checkpoint of a diffusion U-Net.")
    raise CheckpointError("--from", wanted, f"the checkpoint is of format {found}", f"Use --from {found}.")
