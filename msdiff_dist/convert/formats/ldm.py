"""CompVis latent-diffusion checkpoints, and the official multi-stage code's, which differ in the decoders' names.

model.diffusion_model.*     the U-Net
model_ema.*                 its averaged weights, under the same names without their dots
first_stage_model.*         the autoencoder
cond_stage_model.*          the source of context: an embedding of classes, or a text encoder
betas, ...                  tables of the noise schedule
scale_factor                the factor on latents
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from msdiff_dist.convert.formats.ldm_architecture import DecoderNames, infer_model
from msdiff_dist.convert.formats.ldm_autoencoder import read_first_stage, write_first_stage
from msdiff_dist.convert.formats.ldm_yaml import LdmYaml
from msdiff_dist.convert.formats.noise_tables import (
    STABLE_DIFFUSION,
    redundant_tables,
    schedule_tables,
    shortest,
    stored_schedule,
)
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
from msdiff_dist.convert.networks import note
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

# Beginnings of names in LDM's checkpoints.
UNET, EMA, FIRST_STAGE, CONDITION = "model.diffusion_model.", "model_ema.", "first_stage_model.", "cond_stage_model."
CLASS_TABLE = f"{CONDITION}embedding.weight"
SD_SCALE = 0.18215
"""Stable Diffusion's factor on latents."""
SD2_CONTEXT = 1024
"""Channels of the text context of Stable Diffusion 2."""
PAPER_BOUNDARIES = (442.0, 631.0)
"""The multi-stage paper's boundaries for models with 1000 discrete timesteps."""


class NullRow(Layout):
    """Theirs is a table of classes without a row for the dropped class; ours gets a row of zeros for it."""

    def to_ours(self, theirs: list[Tensor]) -> Tensor:
        return torch.cat([theirs[0], torch.zeros_like(theirs[0][:1])])

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        return [ours[:-1]]


def decoder_names(num_stages: int, multistage: bool) -> list[DecoderNames]:
    """Names of the decoders, stage 0 first. LDM has one decoder, the multi-stage code (`multistage`) lists of them."""
    if not multistage:
        return [DecoderNames("output_blocks.", "out.")]
    return [DecoderNames(f"de_modules.{k}.", f"outs.{k}.") for k in range(num_stages)]


def ldm_unet_rules(model: LDMConfig, multistage: bool, null_class: bool = True) -> list[Rule]:
    """Rules for every parameter of our model, which must have a shared encoder, and LDM's state dict.

    Args:
        multistage: use the names of the multi-stage code's decoders.
        null_class: whether their table of classes has a row for the dropped class.
    """
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
    """Every parameter's name and its layout in LDM, whose self-attention projects with convolutions over one axis."""
    pointwise = {
        f"{name}.{layer}.weight"
        for name, module in model.named_modules()
        if isinstance(module, SelfAttentionBlock)
        for layer in ("qkv", "proj_out")
    }
    for name, _ in model.named_parameters():
        yield name, Pointwise(1) if name in pointwise else SAME


def ema_name(key: str) -> str:
    """LDM's name of the average of the parameter `key`, which begins with `UNET`: the same without its dots."""
    return EMA + key.removeprefix("model.").replace(".", "")


def read_ldm(source: TensorSource, options: ConvertOptions, multistage: bool = False) -> ModelWeights:
    """A checkpoint of LDM, or of the official multi-stage LDM code (`multistage`), as our weights.

    Raises:
        CheckpointError: it is of another format, incomplete, or has unexpected keys.
        ConfigError: the given configuration is unusable.
    """
    what = "official-ldm" if multistage else "ldm"
    keys = source.names()
    refuse_other_formats(keys, what)
    source = _prefixed(source)
    keys = source.names()
    stages = len({k.removeprefix(UNET).split(".")[1] for k in keys if k.startswith(f"{UNET}de_modules.")})
    yaml_config = LdmYaml.load(options.config) if options.config else None
    model, assumed = _inferred_model(source, options, yaml_config, decoder_names(stages, multistage))

    # The network is read either from its last weights or from their averages, which have names of their own.
    raw_rules = ldm_unet_rules(model, multistage, options.null_class)
    use_ema = _use_ema(source, options, what)
    if use_ema and options.weights == "auto":
        assumed.append("weights: the averages (model_ema); give --weights raw for the last ones")
    assumed += note(source.taken, options.weights)
    rules = _ema_rules(raw_rules) if use_ema else raw_rules
    scale, assumptions = _scale_factor(source, options, yaml_config, model)
    assumed += assumptions
    discrete, assumptions = _schedule(source, options, yaml_config, model, scale)
    assumed += assumptions
    boundaries: tuple[float, ...] = ()
    if multistage:
        given = options.boundaries or (yaml_config.boundaries() if yaml_config and model.num_stages > 1 else None)
        boundaries, assumptions = given_boundaries(given, model.num_stages, PAPER_BOUNDARIES)
        assumed += assumptions
    first_stage = read_first_stage(under(source, FIRST_STAGE), yaml_config.first_stage if yaml_config else {})

    used = {k: [r.ours] for r in rules for k in r.theirs}
    if first_stage:
        used |= {FIRST_STAGE + k: [f"autoencoder/{name}" for name in names] for k, names in first_stage.used.items()}
    left_out = {**source.left_out, **redundant_tables(source, discrete), **_left_out(source, raw_rules, used, use_ema)}
    if first_stage:
        left_out |= {FIRST_STAGE + k: reason for k, reason in first_stage.left_out.items()}
    shapes = dict(empty_model(model).named_parameters())
    check_complete(source, rules, {*left_out, *used}, shapes, what)
    description = ModelDescription(
        model=model,
        diffusion=DiffusionConfig(process="discrete", section=discrete),
        stages=StagesConfig(boundaries=boundaries),
        autoencoder=AutoencoderConfig(scale_factor=scale, **(first_stage.config_fields() if first_stage else {})),
        sample_size=yaml_config.sample_size() if yaml_config else None,
        weights="ema" if use_ema or (source.taken is not None and source.taken.averaged) else "raw",
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
    """For each known key that is not converted, the reason. Unknown keys are not in it, so `check_complete` names them.

    Args:
        rules: those of the last weights.
        used: the keys that are converted.
        use_ema: whether the averages are converted.
    """
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

    It holds the U-Net, the schedule's tables, and the autoencoder if there is one. The U-Net is written twice, as last
    and as averaged weights, because LDM's samplers take the averaged ones; without `options.model_ema` only as last.

    Raises:
        CheckpointError: LDM has no such model, or the file's suffix is neither.
    """
    model = _checked_model(weights, multistage)
    rules = ldm_unet_rules(model, multistage, options.null_class)
    tables = schedule_tables(weights.description.diffusion.settings())
    scale = MemorySource({"scale_factor": torch.tensor(weights.description.autoencoder.scale_factor)})
    parts: list[TensorSource] = [TheirsFromOurs(weights.tensors, rules), tables, scale]
    names = {r.ours: list(r.theirs) for r in rules}
    added = dict.fromkeys([*tables.names(), "scale_factor"], "from the noise schedule and the autoencoder's scale")
    if options.model_ema:
        # A table of classes stays outside the U-Net, and LDM does not average it.
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
    """The model's configuration, if LDM (or the multi-stage code) has such a model.

    Raises:
        CheckpointError: it does not; the error names the field that differs.
    """
    model = ldm_model(weights, "LDM")
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
    """The tensors of `source`, with `prefix` before their names."""
    return RenamedSource(source, {prefix + k: k for k in source.names()})


def _inferred_model(
    source: TensorSource, options: ConvertOptions, yaml_config: LdmYaml | None, decoders: Sequence[DecoderNames]
) -> tuple[LDMConfig, list[str]]:
    """The configuration of the checkpoint's U-Net, and what was assumed for it.

    Raises:
        CheckpointError: the tensors are of another network than LDM's, or differ from the YAML.
    """
    table = tuple(source.meta(CLASS_TABLE).shape) if CLASS_TABLE in source else None
    given = options.heads() or (yaml_config.heads() if yaml_config else None)
    model, heads = infer_model(under(source, UNET), decoders, table, given)  # type: ignore[arg-type]
    if yaml_config:
        model = replace(model, legacy_attention_order=not yaml_config.unet.get("use_new_attention_order", False))
        yaml_config.check(model)
    # `infer_model` takes the table's last row for the dropped class; here all its rows are classes.
    if model.num_classes is not None and not options.null_class:
        model = replace(model, num_classes=model.num_classes + 1)
    assumed = [] if given else [f"attention heads: {heads.why}"]
    return model, assumed


def _use_ema(source: TensorSource, options: ConvertOptions, what: str) -> bool:
    """Whether to convert LDM's averages beside the network; they are asked for, or there and not declined."""
    if source.taken is not None and source.taken.averaged:
        return False  # the tensors under the network's own names are averages
    present = any(k.startswith(EMA) for k in source.names())
    if options.weights == "ema" and not present:
        raise CheckpointError(
            "--weights", "ema", f"the {what} checkpoint holds no averaged weights (model_ema.*)",
            "Use --weights raw.",
        )  # fmt: skip
    return present and options.weights != "raw"


def _ema_rules(rules: list[Rule]) -> list[Rule]:
    """The rules for the averages: those of the U-Net with the averages' names, others (a table of classes) unchanged.

    Raises:
        CheckpointError: two parameters' averages have one name.
    """
    averaged = [replace(r, theirs=(ema_name(r.theirs[0]),)) if r.theirs[0].startswith(UNET) else r for r in rules]
    names = [k for r in averaged for k in r.theirs]
    if len(set(names)) != len(names):
        clash = next(k for k in names if names.count(k) > 1)
        raise CheckpointError(
            clash, None, "could be the average of two parameters: without dots their names are one",
            "Use --weights raw.",
        )  # fmt: skip
    return averaged


def _schedule(
    source: TensorSource, options: ConvertOptions, yaml_config: LdmYaml | None, model: LDMConfig, scale: float
) -> tuple[DiscreteConfig, list[str]]:
    """The noise schedule and prediction, from the YAML, else from the tables; and what was assumed for them."""
    prediction = options.prediction_type
    if yaml_config is not None:
        return yaml_config.discrete(prediction), []
    assumed = []
    if prediction is None:
        assumed.append("prediction: epsilon; give --prediction v_prediction for a model trained so")
        if model.context_dim == SD2_CONTEXT:
            assumed[-1] += ", as Stable Diffusion 2 for 768 pixels was"
    discrete = stored_schedule(source)
    if discrete is None:
        whose, (start, end) = "LDM's default", (0.0015, 0.0195)
        if _like_stable_diffusion(model) or math.isclose(scale, SD_SCALE, rel_tol=1e-3):
            whose, (start, end) = "Stable Diffusion's", STABLE_DIFFUSION
        discrete = DiscreteConfig(beta_start=start, beta_end=end)
        assumed.append(
            f"noise schedule: {whose}, scaled_linear betas {start} to {end}; the checkpoint has no tables; "
            "give --config otherwise"
        )
    return replace(discrete, prediction_type=prediction or "epsilon"), assumed


def _like_stable_diffusion(model: LDMConfig) -> bool:
    """Whether a network has text context and four channels of latents; inpainting's take more than they give."""
    return model.takes_context and model.out_channels == 4


def _scale_factor(
    source: TensorSource, options: ConvertOptions, yaml_config: LdmYaml | None, model: LDMConfig
) -> tuple[float, list[str]]:
    """The factor on latents, and what was assumed for it. LDM stores it only where it measured it on its data."""
    if options.scale_factor is not None:
        return options.scale_factor, []
    if "scale_factor" in source:
        stored = source.read("scale_factor")
        # In half precision several short decimals are the same number.
        published = torch.equal(torch.tensor(SD_SCALE, dtype=stored.dtype), stored.reshape(()))
        return SD_SCALE if published else shortest(float(stored), stored.dtype), []
    if yaml_config is not None:
        return float(yaml_config.model.get("scale_factor", 1.0)), []
    if _like_stable_diffusion(model):
        return SD_SCALE, [f"scale factor of latents: {SD_SCALE}, as in Stable Diffusion; give --scale-factor otherwise"]
    return 1.0, ["scale factor of latents: 1; give --scale-factor otherwise"]
