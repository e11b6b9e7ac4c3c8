"""CompVis latent-diffusion checkpoints, and the official multi-stage code's, which differ in the decoders' names.

model.diffusion_model.*     the U-Net; with the averaged weights as model_ema.* under names without dots
first_stage_model.*         the autoencoder
cond_stage_model.*          what makes the context: an embedding of classes, or a text encoder
betas ... scale_factor      tables of the noise schedule
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from msdiff_dist.convert.formats.ldm_architecture import DecoderNames, infer_model
from msdiff_dist.convert.formats.ldm_autoencoder import read_first_stage, write_first_stage
from msdiff_dist.convert.formats.ldm_yaml import LdmYaml
from msdiff_dist.convert.formats.noise_tables import recognise_schedule, redundant_tables, schedule_tables
from msdiff_dist.convert.key_map import (
    SAME,
    Layout,
    OursFromTheirs,
    Pointwise,
    Rule,
    TheirsFromOurs,
    check_complete,
)
from msdiff_dist.convert.model_weights import JoinedSource, ModelWeights, Written, empty_model, ldm_model
from msdiff_dist.convert.options import ConvertOptions, given_boundaries
from msdiff_dist.convert.recognition import refuse_other_formats
from msdiff_dist.convert.tensor_sources import MemorySource, RenamedSource, TensorSource, under
from msdiff_dist.convert.writing import write_state_dict
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig
from msdiff_dist.errors import CheckpointError
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.models.attention import SelfAttentionBlock
from msdiff_dist.models.autoencoder import AutoencoderConfig
from msdiff_dist.models.ldm.config import LDMConfig

UNET, EMA, FIRST_STAGE, CONDITION = "model.diffusion_model.", "model_ema.", "first_stage_model.", "cond_stage_model."
CLASS_TABLE = f"{CONDITION}embedding.weight"
PAPER_BOUNDARIES = (442.0, 631.0)


class NullRow(Layout):
    """A table of classes that has no row for the dropped class: ours gets one of zeros."""

    def to_ours(self, theirs: list[Tensor]) -> Tensor:
        return torch.cat([theirs[0], torch.zeros_like(theirs[0][:1])])

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        return [ours[:-1]]


def decoder_names(num_stages: int, multistage: bool) -> list[DecoderNames]:
    """How the decoders are called: LDM has one, the multi-stage code a list."""
    if not multistage:
        return [DecoderNames("output_blocks.", "out.")]
    return [DecoderNames(f"de_modules.{k}.", f"outs.{k}.") for k in range(num_stages)]


def ldm_unet_rules(model: LDMConfig, multistage: bool, null_class: bool = True) -> list[Rule]:
    """Every parameter of our model (with a shared encoder) and its name in a state dict of LDM's module."""
    decoders = decoder_names(model.num_stages, multistage)
    rules = []
    for name, layout in _layouts(empty_model(model)):
        part, _, rest = name.partition(".")
        if part == "stages":
            stage, block, rest = rest.split(".", 2)
            theirs = (decoders[int(stage)].blocks if block == "output_blocks" else decoders[int(stage)].head) + rest
        else:
            theirs = rest
        if rest == "label_emb.weight":
            layout = SAME if null_class else NullRow()
            if model.class_conditioning == "context":
                rules.append(Rule(name, (CLASS_TABLE,), layout))
                continue
        rules.append(Rule(name, (UNET + theirs,), layout))
    return rules


def _layouts(model: nn.Module) -> Iterator[tuple[str, Layout]]:
    pointwise = {
        f"{name}.{layer}.weight"
        for name, module in model.named_modules()
        if isinstance(module, SelfAttentionBlock)
        for layer in ("qkv", "proj_out")
    }
    for name, _ in model.named_parameters():
        yield name, Pointwise(1) if name in pointwise else SAME


def ema_name(key: str) -> str:
    """Where LDM keeps the average of the parameter `model.diffusion_model...`: its dots are lost."""
    return EMA + key.removeprefix("model.").replace(".", "")


def read_ldm(source: TensorSource, options: ConvertOptions, multistage: bool = False) -> ModelWeights:
    """A checkpoint of LDM, or of the official multi-stage LDM code, as our weights.

    Raises:
        CheckpointError: it is of another family, incomplete, or has keys that nothing explains.
        ConfigError: the given configuration is unusable.
    """
    what = "official-ldm" if multistage else "ldm"
    keys = source.names()
    refuse_other_formats(keys, what)
    source = _prefixed(source)
    keys = source.names()
    stages = len({k.removeprefix(UNET).split(".")[1] for k in keys if k.startswith(f"{UNET}de_modules.")})
    sheet = LdmYaml.load(options.config) if options.config else None
    model, assumed = _model(source, options, sheet, decoder_names(stages, multistage))

    raw_rules = ldm_unet_rules(model, multistage, options.null_class)
    use_ema = _use_ema(source, options, what)
    rules = _ema_rules(raw_rules) if use_ema else raw_rules
    discrete, said = _schedule(source, options, sheet)
    assumed += said
    scale, said = _scale_factor(source, options, sheet, model)
    assumed += said
    boundaries: tuple[float, ...] = ()
    if multistage:
        given = options.boundaries or (sheet.boundaries() if sheet and model.num_stages > 1 else None)
        boundaries, said = given_boundaries(given, model.num_stages, PAPER_BOUNDARIES)
        assumed += said
    first_stage = read_first_stage(under(source, FIRST_STAGE), sheet.first_stage if sheet else {})

    used = {k: [r.ours] for r in rules for k in r.theirs}
    if first_stage:
        used |= {FIRST_STAGE + k: [f"autoencoder/{name}" for name in names] for k, names in first_stage.used.items()}
    left_out = {**source.left_out, **redundant_tables(source, discrete), **_left_out(source, raw_rules, used, use_ema)}
    if first_stage:
        left_out |= {FIRST_STAGE + k: why for k, why in first_stage.left_out.items()}
    shapes = dict(empty_model(model).named_parameters())
    check_complete(source, rules, {*left_out, *used}, shapes, what)
    description = ModelDescription(
        model=model,
        diffusion=DiffusionConfig(process="discrete", section=discrete),
        stages=StagesConfig(boundaries=boundaries),
        autoencoder=AutoencoderConfig(scale_factor=scale, **(first_stage.config_fields() if first_stage else {})),
        sample_size=sheet.sample_size() if sheet else None,
        weights="ema" if use_ema else "raw",
    )
    return ModelWeights(
        description=description,
        tensors=OursFromTheirs(source, rules),
        autoencoder_weights=first_stage.weights if first_stage else None,
        used=used,
        left_out=left_out,
        assumed=assumed,
    )


def _left_out(source: TensorSource, rules: list[Rule], used: Mapping[str, object], use_ema: bool) -> dict[str, str]:
    """Keys of LDM's that are not of the converted network, and why; what is not known to be so is not in it."""
    network = {k for r in rules for k in r.theirs}
    counters = {f"{EMA}decay", f"{EMA}num_updates"}
    reasons = {}
    for key in source.names():
        if key in used:
            continue
        if key in network:
            reasons[key] = "the last weights; their average was converted"
        elif key in counters or (key.startswith(EMA) and not use_ema):
            reasons[key] = "of the average, which was not converted" if not use_ema else "a counter of the average"
        elif key.startswith(CONDITION):
            reasons[key] = "of the text encoder, which is not part of the network"
        elif key in ("scale_factor", "logvar"):
            reasons[key] = "kept in config.json" if key == "scale_factor" else "weights of the training's loss"
    return reasons


def write_ldm_file(
    weights: ModelWeights,
    path: Path,
    options: ConvertOptions,
    metadata: Mapping[str, str],
    multistage: bool = False,
) -> Written:
    """Write our weights as LDM's state dict, in .safetensors or .ckpt.

    It holds the U-Net (as last and as averaged weights, for LDM's samplers take the average, unless `raw` is asked
    for), the schedule's tables, and the autoencoder if there is one.

    Raises:
        CheckpointError: LDM has no such model, or the file is called neither way.
    """
    model = _checked_model(weights, multistage)
    rules = ldm_unet_rules(model, multistage, options.null_class)
    tables = schedule_tables(weights.description.diffusion.settings())
    scale = MemorySource({"scale_factor": torch.tensor(weights.description.autoencoder.scale_factor)})
    parts: list[TensorSource] = [TheirsFromOurs(weights.tensors, rules), tables, scale]
    names = {r.ours: list(r.theirs) for r in rules}
    added = dict.fromkeys([*tables.names(), "scale_factor"], "from the noise schedule and the autoencoder's scale")
    if options.weights != "raw":
        averaged = [r for r in _ema_rules(rules) if r.theirs[0].startswith(EMA)]
        counters = {f"{EMA}decay": torch.tensor(0.9999), f"{EMA}num_updates": torch.tensor(0, dtype=torch.int32)}
        parts += [TheirsFromOurs(weights.tensors, averaged), MemorySource(counters)]
        for r in averaged:
            names[r.ours] += r.theirs
        added |= dict.fromkeys(counters, "LDM reads it with the average")
    if weights.autoencoder_weights is not None:
        first_stage = write_first_stage(weights.autoencoder_weights)
        parts.append(_under_prefix(FIRST_STAGE, TheirsFromOurs(weights.autoencoder_weights.tensors, first_stage)))
        names |= {f"autoencoder/{r.ours}": [FIRST_STAGE + k for k in r.theirs] for r in first_stage}
    return Written(names=names, files={path.name: write_state_dict(path, JoinedSource(parts), metadata)}, added=added)


def _checked_model(weights: ModelWeights, multistage: bool) -> LDMConfig:
    model = ldm_model(weights, "LDM")
    if not model.share_encoder:
        raise CheckpointError(
            "share_encoder", False, "every stage has an encoder of its own, and LDM's model has one",
            "Convert one stage with --stage.",
        )  # fmt: skip
    if not multistage and (model.num_stages > 1 or model.decoder_channels[0] != model.encoder_width(0)):
        raise CheckpointError(
            "decoder_channels", list(model.decoder_channels), "LDM's model has one decoder, as wide as its encoder",
            "Convert one stage of that width with --stage, or use --to official-ldm.",
        )  # fmt: skip
    if model.norm_groups != 32:
        raise CheckpointError(
            "norm_groups", model.norm_groups, "LDM's code always uses 32", "Convert a model with 32 groups."
        )
    if weights.description.diffusion.process != "discrete":
        raise CheckpointError(
            "diffusion.process",
            weights.description.diffusion.process,
            "LDM only has discrete timesteps",
            "Use another format.",
        )
    return model


def _prefixed(source: TensorSource) -> TensorSource:
    """`source` with the U-Net under LDM's prefix, if it is a bare U-Net."""
    keys = source.names()
    if any(k.startswith("input_blocks.") for k in keys):
        return _under_prefix(UNET, source)
    if any(k.startswith("diffusion_model.input_blocks.") for k in keys):
        return _under_prefix("model.", source)
    return source


def _under_prefix(prefix: str, source: TensorSource) -> RenamedSource:
    return RenamedSource(source, {prefix + k: k for k in source.names()})


def _model(
    source: TensorSource, options: ConvertOptions, sheet: LdmYaml | None, decoders: Sequence[DecoderNames]
) -> tuple[LDMConfig, list[str]]:
    table = tuple(source.meta(CLASS_TABLE).shape) if CLASS_TABLE in source else None
    given = options.heads() or (sheet.heads() if sheet else None)
    model, heads = infer_model(under(source, UNET), decoders, table, given)  # type: ignore[arg-type]
    if sheet:
        model = replace(model, legacy_attention_order=not sheet.unet.get("use_new_attention_order", False))
        sheet.check(model)
    if model.num_classes is not None and not options.null_class:
        model = replace(model, num_classes=model.num_classes + 1)
    assumed = [] if given else [f"attention heads: {heads.why}"]
    return model, assumed


def _use_ema(source: TensorSource, options: ConvertOptions, what: str) -> bool:
    present = any(k.startswith(EMA) for k in source.names())
    if options.weights == "ema" and not present:
        raise CheckpointError(
            "--weights", "ema", f"the {what} checkpoint holds no averaged weights (model_ema.*)",
            "Use --weights raw.",
        )  # fmt: skip
    return present and options.weights != "raw"


def _ema_rules(rules: list[Rule]) -> list[Rule]:
    """The rules with every averaged parameter's key; parts that LDM does not average stay as they are."""
    averaged = [replace(r, theirs=(ema_name(r.theirs[0]),)) if r.theirs[0].startswith(UNET) else r for r in rules]
    names = [k for r in averaged for k in r.theirs]
    if len(set(names)) != len(names):
        clash = next(k for k in names if names.count(k) > 1)
        raise CheckpointError(
            clash, None, "could be the average of two parameters: without dots their names are one",
            "Use --weights raw.",
        )  # fmt: skip
    return averaged


def _schedule(source: TensorSource, options: ConvertOptions, sheet: LdmYaml | None) -> tuple[DiscreteConfig, list[str]]:
    assumed = []
    prediction = options.prediction_type
    if sheet is not None:
        discrete = sheet.discrete(prediction)
    else:
        if prediction is None:
            assumed.append("prediction: epsilon; give --prediction v_prediction for a model trained so")
        discrete = DiscreteConfig(prediction_type=prediction or "epsilon")
        if "betas" in source:
            discrete = replace(recognise_schedule(source.read("betas")), prediction_type=discrete.prediction_type)
        else:
            assumed.append("noise schedule: LDM's default, betas 0.0015 to 0.0195; the checkpoint has no tables")
    return discrete, assumed


def _scale_factor(
    source: TensorSource, options: ConvertOptions, sheet: LdmYaml | None, model: LDMConfig
) -> tuple[float, list[str]]:
    if options.scale_factor is not None:
        return options.scale_factor, []
    if "scale_factor" in source:
        return float(source.read("scale_factor")), []
    if sheet is not None:
        return float(sheet.model.get("scale_factor", 1.0)), []
    if model.takes_context and model.in_channels == 4:
        return 0.18215, ["scale factor of latents: 0.18215, as in Stable Diffusion; give --scale-factor otherwise"]
    return 1.0, ["scale factor of latents: 1; give --scale-factor otherwise"]
