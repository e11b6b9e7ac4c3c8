"""The format `diffusers`: a folder of one U-Net, or of a pipeline with U-Net, scheduler and autoencoder.

A written pipeline has model_index.json, unet/, scheduler/ and, where the model has them, vae/, text_encoder/ and
tokenizer/. A model that no stock class holds brings its own class and pipeline (`carried/`), which diffusers loads with
`trust_remote_code=True`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from msdiff_dist.convert import carried
from msdiff_dist.convert.edit.stages import extract_stage, stage_names
from msdiff_dist.convert.formats.diffusers_scheduler import SCHEDULES, read_scheduler
from msdiff_dist.convert.formats.diffusers_unet import STOCK, diffusers_unet_rules, model_of_stock, stock_config
from msdiff_dist.convert.formats.frozen_networks import (
    TEXT,
    TEXT_ENCODER,
    TOKENIZER,
    read_autoencoder,
    read_text_encoder,
    write_frozen,
)
from msdiff_dist.convert.formats.ldm import PAPER_BOUNDARIES
from msdiff_dist.convert.formats.model_folder import WEIGHTS, json_of, weights_of, write_json
from msdiff_dist.convert.key_map import OursFromTheirs, TheirsFromOurs, check_complete
from msdiff_dist.convert.model_weights import (
    AutoencoderWeights,
    ModelWeights,
    TextEncoderWeights,
    Written,
    empty_model,
    ldm_model,
)
from msdiff_dist.convert.options import ConvertOptions, given_boundaries
from msdiff_dist.convert.recognition import refuse_other_formats, refuse_other_inputs, refuse_other_pipelines
from msdiff_dist.convert.tensor_sources import TensorSource
from msdiff_dist.convert.writing import write_safetensors
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig
from msdiff_dist.errors import CheckpointError, ConfigError
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.models.autoencoder import AutoencoderConfig
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.ldm.config import LDMConfig
from msdiff_dist.models.text_encoder import TextEncoderConfig

_CARRIED = Path(carried.__file__).parent
OWN_CLASS, OWN_MODULE = "MultistageUNet2DModel", "multistage_unet_2d"
PIPELINE_CLASS, PIPELINE_MODULE = "MultistagePipeline", "multistage_pipeline"
# Files about the model's licence and use, copied along.
_NOTES = ("LICENSE*", "NOTICE*", "README.md")


def read_diffusers(folder: Path, options: ConvertOptions) -> ModelWeights:
    """Open a pipeline's folder, or the folder of a U-Net alone.

    Raises:
        CheckpointError: a file is missing, or this package has no such network.
    """
    folder = folder.expanduser()
    refuse_other_pipelines(folder)
    unet = _unet_folder(folder, options)
    config = json_of(unet / "config.json")
    has_index, scheduler = (folder / "model_index.json").exists(), folder / "scheduler" / "scheduler_config.json"
    if not has_index and (unet == folder or not scheduler.exists()):
        return read_unet(config, weights_of(unet, options), options)
    refuse_other_inputs(config)
    index = json_of(folder / "model_index.json") if has_index else {}
    found = read_unet(config, weights_of(unet, options), options)
    diffusion = DiffusionConfig(process="discrete", section=read_scheduler(json_of(scheduler), options))
    vae = next((folder / name for name in ("vae", "vqvae") if (folder / name).is_dir()), None)
    autoencoder, vae_weights, assumptions = _read_autoencoder(vae, index, options)
    text, why_no_text = _read_text(folder, found.model)
    converted = ["unet", "scheduler", *([vae.name] if vae else []), *([TEXT_ENCODER, TOKENIZER] if text else [])]
    for name, value in index.items():
        if isinstance(value, list) and value[0] is not None and name not in ("_class_name", *converted):
            reason = why_no_text if name in (TEXT_ENCODER, TOKENIZER) else None
            found.left_out[f"{name}/"] = reason or "a part of the pipeline that is not the network"
    if vae and vae_weights:
        found.used |= {f"{vae.name}/{k}": [f"autoencoder/{k}"] for k in vae_weights.tensors.names()}
    if text:
        found.used |= {f"{TEXT_ENCODER}/{k}": [f"{TEXT_ENCODER}/{k}"] for k in text.tensors.names()}
    return replace(
        found,
        description=replace(
            found.description,
            diffusion=diffusion,
            autoencoder=autoencoder,
            text_encoder=TextEncoderConfig(kind="clip", name=TEXT) if text else None,
            context_shape=text.context_shape if text else None,
        ),
        autoencoder_weights=vae_weights,
        text_encoder_weights=text,
        assumed=assumptions,  # not the U-Net's, whose schedule and scale the pipeline states
        notes=[p for pattern in _NOTES for p in sorted(folder.glob(pattern))],
        unstated=frozenset() if has_index or vae else frozenset({"autoencoder"}),
    )


def _unet_folder(folder: Path, options: ConvertOptions) -> Path:
    """The folder of the U-Net: this one, or one inside it; of averaged and last weights, those that are asked for.

    Raises:
        CheckpointError: the averaged weights are asked for, and there are none.
    """
    averaged = folder / "unet_ema"  # diffusers' training scripts write it beside `unet`
    if options.weights != "raw" and averaged.is_dir():
        return averaged
    if options.weights == "ema" and folder.name != averaged.name:
        raise CheckpointError("--weights", "ema", f"{folder} has no unet_ema folder", "Remove --weights.")
    return folder / "unet" if (folder / "unet").is_dir() else folder


def read_unet(config: Mapping[str, Any], source: TensorSource, options: ConvertOptions) -> ModelWeights:
    """Read a U-Net of the given config.json; its noise schedule is assumed to be Stable Diffusion's.

    Raises:
        CheckpointError: this package has no such network, or the tensors do not fit it.
    """
    if config.get("_class_name") in STOCK:
        model, boundaries = model_of_stock(config), tuple[float, ...]()
    elif config.get("_class_name") == OWN_CLASS:
        model, boundaries = _model_of_own(config), tuple(float(b) for b in config["stage_boundaries"])
    else:
        raise CheckpointError(
            "config.json", config.get("_class_name"), "is a class that this package has no model for",
            f"Convert one of {', '.join([*STOCK, OWN_CLASS])}.",
        )  # fmt: skip
    if options.boundaries is not None:
        boundaries, _ = given_boundaries(options.boundaries, model.num_stages, PAPER_BOUNDARIES)
    refuse_other_formats(source.names(), "diffusers")
    old = any(".attentions.0.query.weight" in k for k in source.names())
    rules = diffusers_unet_rules(model, config["_class_name"] == OWN_CLASS, old)
    check_complete(source, rules, source.left_out, dict(empty_model(model).named_parameters()), "diffusers")
    prediction = options.prediction_type or "epsilon"
    discrete = DiscreteConfig(beta_start=0.00085, beta_end=0.012, prediction_type=prediction)
    size = config.get("sample_size")
    description = ModelDescription(
        model=model,
        diffusion=DiffusionConfig(process="discrete", section=discrete),
        stages=StagesConfig(boundaries=boundaries),
        autoencoder=AutoencoderConfig(scale_factor=options.scale_factor or 1.0),
        sample_size=tuple(size) if isinstance(size, list) else size,
    )
    return ModelWeights(
        description=description,
        tensors=OursFromTheirs(source, rules),
        used={k: [r.ours] for r in rules for k in r.theirs},
        left_out=dict(source.left_out),
        assumed=[f"noise schedule: betas 0.00085 to 0.012, {prediction}; a U-Net alone has no scheduler"],
        unstated=frozenset({"diffusion", "autoencoder"}),
    )


def write_diffusers(weights: ModelWeights, folder: Path, metadata: Mapping[str, str]) -> Written:
    """Write a pipeline's folder. The U-Net is of a stock class if one computes the same, else of our own.

    Stages that share no encoder are written apart, each as the pipeline of a unified model: stage_0, stage_1 and so on.

    Raises:
        CheckpointError: diffusers' schedulers do not have the model's process.
    """
    if not weights.model.share_encoder:
        return _write_stages(weights, folder, metadata)
    model = ldm_model(weights, "diffusers")
    if weights.description.diffusion.process != "discrete":
        raise CheckpointError(
            "diffusion.process", weights.description.diffusion.process, "diffusers' schedulers take discrete timesteps",
            "Use --to msdiff, or a model with a discrete process.",
        )  # fmt: skip
    stock = stock_config(model)
    own = isinstance(stock, str)
    config = _own_config(model, weights) if isinstance(stock, str) else stock
    rules = diffusers_unet_rules(model, own_class=own)
    written = Written(names={r.ours: [f"unet/{k}" for k in r.theirs] for r in rules})
    if isinstance(stock, str):
        written.remarks.append(f"no stock diffusers class holds this model, because {stock}")

    unet = folder / "unet"
    unet.mkdir(parents=True)
    write_json(unet / "config.json", {**config, "sample_size": weights.description.sample_size})
    written.files[f"unet/{WEIGHTS}"] = write_safetensors(
        unet / WEIGHTS, TheirsFromOurs(weights.tensors, rules), metadata
    )
    discrete = weights.description.diffusion.settings()
    write_json(folder / "scheduler" / "scheduler_config.json", _scheduler_config(discrete))
    written.remarks += _remarks(weights)
    write_frozen(_scaled(weights), folder / "vae", folder, folder, written, metadata)
    _write_index(weights, folder, config["_class_name"])
    return written


def _write_stages(weights: ModelWeights, folder: Path, metadata: Mapping[str, str]) -> Written:
    """Write every stage, with its encoder, in a folder of its own."""
    written = Written(names={})
    for k in range(weights.model.num_stages):
        below = f"stage_{k}"
        one = write_diffusers(extract_stage(weights, k), folder / below, metadata)
        ours = stage_names(weights, k)
        for name, theirs in one.names.items():  # the autoencoder goes to every stage, under its own names
            written.names.setdefault(ours.get(name, name), []).extend(f"{below}/{key}" for key in theirs)
        written.files |= {f"{below}/{file}": digest for file, digest in one.files.items()}
        written.remarks += [f"{below}: {remark}" for remark in one.remarks]
    return written


def _own_config(model: LDMConfig, weights: ModelWeights) -> dict[str, Any]:
    """config.json of our own class."""
    levels = range(len(model.channel_mult))
    return {
        "_class_name": OWN_CLASS,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "conv_in_channels": model.encoder_width(0),
        "block_out_channels": [model.encoder_width(0) * m for m in model.channel_mult],
        "decoder_block_out_channels": [[w * m for m in model.channel_mult] for w in model.decoder_channels],
        "layers_per_block": model.num_res_blocks,
        "down_block_attention": [2**i in model.attention_downsamples for i in levels],
        "decoder_attention": [[2**i in model.attention_of(k) for i in levels] for k in range(model.num_stages)],
        "stage_boundaries": list(weights.description.stages.boundaries),
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.num_head_channels,
        "cross_attention_dim": model.context_dim,
        "transformer_layers_per_block": model.transformer_depth,
        "use_linear_projection": model.use_linear_in_transformer,
        "num_class_embeds": None if model.num_classes is None else model.num_classes + 1,
        "class_embeddings_as_context": model.class_conditioning == "context",
        "resnet_time_scale_shift": "scale_shift" if model.use_scale_shift_norm else "default",
        "resnet_resampling": model.resblock_updown,
        "norm_num_groups": model.norm_groups,
        "dropout": model.dropout,
    }


def _model_of_own(config: Mapping[str, Any]) -> LDMConfig:
    """The inverse of `_own_config`.

    Raises:
        CheckpointError: a field is missing, or the fields make no model.
    """
    try:
        width = config["conv_in_channels"]
        mults = tuple(w // width for w in config["block_out_channels"])
        places = [tuple(2**i for i, a in enumerate(flags) if a) for flags in config["decoder_attention"]]
        attention = tuple(2**i for i, a in enumerate(config["down_block_attention"]) if a)
        classes = config["num_class_embeds"]
        return LDMConfig(
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            encoder_channels=width,
            decoder_channels=tuple(widths[0] // mults[0] for widths in config["decoder_block_out_channels"]),
            channel_mult=mults,
            num_res_blocks=config["layers_per_block"],
            attention_downsamples=attention,
            decoder_attention=None if all(p == attention for p in places) else tuple(places),
            num_heads=config["num_attention_heads"],
            num_head_channels=config["attention_head_dim"],
            context_dim=config["cross_attention_dim"],
            transformer_depth=config["transformer_layers_per_block"],
            use_linear_in_transformer=config["use_linear_projection"],
            num_classes=None if classes is None else classes - 1,
            class_conditioning="context" if config["class_embeddings_as_context"] else "embedding",
            use_scale_shift_norm=config["resnet_time_scale_shift"] == "scale_shift",
            resblock_updown=config["resnet_resampling"],
            norm_groups=config["norm_num_groups"],
            dropout=config["dropout"],
        )
    except (KeyError, TypeError, ConfigError) as e:
        raise CheckpointError(
            "unet/config.json", OWN_CLASS, f"is corrupt ({type(e).__name__}: {e})", "Export the model again."
        ) from None


def _scheduler_config(discrete: DiscreteConfig) -> dict[str, Any]:
    # One step of offset, and the last step ends at timestep 0, as in LDM's own sampler.
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": discrete.timesteps,
        "beta_start": discrete.beta_start,
        "beta_end": discrete.beta_end,
        "beta_schedule": SCHEDULES[discrete.schedule],
        "prediction_type": discrete.prediction_type,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }


def _read_autoencoder(
    folder: Path | None, index: Mapping[str, Any], options: ConvertOptions
) -> tuple[AutoencoderConfig, AutoencoderWeights | None, list[str]]:
    scale, shuffle = options.scale_factor or index.get("scale_factor"), index.get("pixel_shuffle", 1)
    if folder is None:
        kind = "space_to_depth" if shuffle > 1 else "pixel"
        return AutoencoderConfig(kind=kind, factor=shuffle, scale_factor=scale or 1.0), None, []  # type: ignore[arg-type]
    weights = read_autoencoder(folder)
    assumptions = [] if scale else ["scale factor of latents: the autoencoder's scaling_factor"]
    scale = scale or weights.config.get("scaling_factor", 0.18215)
    kind = "vq" if weights.class_name == "VQModel" else "kl"
    return AutoencoderConfig(kind=kind, path="autoencoder", scale_factor=scale), weights, assumptions  # type: ignore[arg-type]


def _read_text(folder: Path, model: ModelConfig) -> tuple[TextEncoderWeights | None, str]:
    """The text encoder of a pipeline whose U-Net takes text, or None and the reason."""
    try:
        text = read_text_encoder(folder)
    except CheckpointError as e:
        return None, f"it {e.problem}" if e.value is None else f"{e.value} {e.problem}"
    width = text.context_shape[1]
    if width != model.context_channels:
        return None, f"its tokens are {width} wide, and the U-Net takes {model.context_channels}"
    return text, ""


def _scaled(weights: ModelWeights) -> ModelWeights:
    """The same with the scale of latents in the autoencoder's config.json, where diffusers looks for it."""
    vae = weights.autoencoder_weights
    if vae is None:
        return weights
    config = {**vae.config, "scaling_factor": weights.description.autoencoder.scale_factor}
    return replace(weights, autoencoder_weights=replace(vae, config=config))


def _remarks(weights: ModelWeights) -> list[str]:
    """What the user has to add to the written pipeline."""
    codec, text = weights.description.autoencoder, weights.description.text_encoder
    remarks = []
    if weights.autoencoder_weights is None and codec.kind in ("kl", "vq"):
        remarks.append(f"the autoencoder {codec.path} is not in the source: give it to the pipeline as vae")
    if weights.text_encoder_weights is None and weights.model.takes_context:
        named = f"the text encoder {text.name}" if text else "a text encoder"
        remarks.append(f"{named} is not in the source: give the pipeline prompt_embeds instead of a prompt")
    return remarks


def _write_index(weights: ModelWeights, folder: Path, unet_class: str) -> None:
    """Write model_index.json, and the code that the pipeline needs beside diffusers."""
    description = weights.description
    codec, has_vae = description.autoencoder, weights.autoencoder_weights is not None
    has_text = weights.text_encoder_weights is not None
    own = unet_class == OWN_CLASS
    if own:
        shutil.copy(_CARRIED / f"{OWN_MODULE}.py", folder / "unet")
    absent = [None, None]
    index: dict[str, Any] = {
        "unet": [OWN_MODULE if own else "diffusers", unet_class],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    parts = {
        "vae": ["diffusers", "VQModel" if codec.kind == "vq" else "AutoencoderKL"] if has_vae else absent,
        "text_encoder": ["transformers", "CLIPTextModel"] if has_text else absent,
        "tokenizer": ["transformers", "CLIPTokenizer"] if has_text else absent,
    }
    plain = description.model.num_classes is None
    # diffusers' own pipelines have no classes. That of images has neither autoencoder nor scale.
    if unet_class == "UNet2DModel" and codec.kind == "pixel" and codec.scale_factor == 1 and plain:
        index["_class_name"] = "DDIMPipeline"
    elif unet_class == "UNet2DConditionModel" and codec.kind == "kl" and has_vae and has_text and plain:
        index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **parts}
        index |= dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), absent)
    else:
        shutil.copy(_CARRIED / f"{PIPELINE_MODULE}.py", folder)
        index |= {
            "_class_name": [PIPELINE_MODULE, PIPELINE_CLASS],
            "scale_factor": codec.scale_factor,
            "pixel_shuffle": codec.factor if codec.kind == "space_to_depth" else 1,
            **parts,
        }
    write_json(folder / "model_index.json", index)
