"""LDM's configuration YAML: its settings as this package's, and a comparison of them with a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from msdiff_dist.convert.options import HeadsRule
from msdiff_dist.diffusion.denoiser import PredictionType
from msdiff_dist.diffusion.noise_schedule import ScheduleName
from msdiff_dist.diffusion.processes.discrete import DiscreteConfig
from msdiff_dist.errors import CheckpointError, ConfigError
from msdiff_dist.files.text import read_text
from msdiff_dist.files.yaml_tree import parse_yaml
from msdiff_dist.models.ldm.config import LDMConfig

# LDM's names of schedules and predictions, and ours. Its "linear" is linear in the square root of beta.
_SCHEDULES: dict[str, ScheduleName] = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}
_PREDICTIONS: dict[str, PredictionType] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@dataclass(frozen=True, kw_only=True)
class LdmYaml:
    """The sections of an LDM configuration that a conversion needs."""

    path: Path
    """The file, for messages."""
    model: Mapping[str, Any]
    """Content of `model.params`."""
    unet: Mapping[str, Any]
    """Content of `model.params.unet_config.params`."""
    first_stage: Mapping[str, Any]
    """Content of `model.params.first_stage_config`; empty where there is none."""

    @staticmethod
    def load(path: Path) -> LdmYaml:
        """Read a file.

        Raises:
            ConfigError: the file is absent, no YAML, or without a section for the U-Net.
        """
        text = read_text(path, "--config")
        try:
            raw = parse_yaml(text)
            model = raw["model"]["params"]
            unet = model["unet_config"]["params"]
        except (yaml.YAMLError, KeyError, TypeError) as e:
            raise ConfigError(
                "--config", str(path), f"is no LDM configuration ({type(e).__name__}: {' '.join(str(e).split())})",
                "Give the YAML that holds model.params.unet_config.params.",
            ) from None  # fmt: skip
        if not isinstance(model, Mapping) or not isinstance(unet, Mapping):
            raise ConfigError(
                "--config", str(path), "is no LDM configuration (model.params is no mapping)",
                "Give the YAML that holds model.params.unet_config.params.",
            )  # fmt: skip
        first_stage = model.get("first_stage_config") or {}
        return LdmYaml(
            path=path, model=model, unet=unet, first_stage=first_stage if isinstance(first_stage, Mapping) else {}
        )

    def heads(self) -> HeadsRule | None:
        """The rule for attention heads. Where both numbers are set, channels per head decide, as in LDM's code."""
        per_head, number = self.unet.get("num_head_channels", -1), self.unet.get("num_heads", -1)
        if per_head != -1:
            return HeadsRule(None, int(per_head), f"num_head_channels in {self.path.name}")
        return None if number == -1 else HeadsRule(int(number), None, f"num_heads in {self.path.name}")

    def sample_size(self) -> int | None:
        """Height and width of the latents; None where the file sets none."""
        size = self.unet.get("image_size", self.model.get("image_size"))
        return size if isinstance(size, int) else None

    def boundaries(self) -> tuple[float, ...] | None:
        """Inner stage boundaries: the upper bounds of all stages but the last. None where the file sets none."""
        bounds = self.unet.get("stage_interval")
        return None if not bounds else tuple(float(b) for b in bounds[:-1])

    def discrete(self, prediction: PredictionType | None) -> DiscreteConfig:
        """The noise schedule, and what the network predicts; `prediction` overrides the file's.

        Raises:
            ConfigError: the file sets a schedule or parameterization that this package does not have.
        """
        name = self.model.get("beta_schedule", "linear")
        parameterization = self.model.get("parameterization", "eps")
        if name not in _SCHEDULES or parameterization not in _PREDICTIONS:
            raise ConfigError(
                "--config", f"{name}, {parameterization}", "is no known schedule and parameterization",
                f"Use one of {', '.join(_SCHEDULES)} and of {', '.join(_PREDICTIONS)}.",
            )  # fmt: skip
        return DiscreteConfig(
            timesteps=int(self.model.get("timesteps", 1000)),
            schedule=_SCHEDULES[name],
            beta_start=float(self.model.get("linear_start", 1e-4)),
            beta_end=float(self.model.get("linear_end", 2e-2)),
            prediction_type=prediction or _PREDICTIONS[parameterization],
        )

    def check(self, model: LDMConfig) -> None:
        """Compare the settings that tensors show with the configuration inferred from them.

        Raises:
            CheckpointError: they differ; the error names the field and both values.
        """
        # Factors of levels that the network does not have are without effect in LDM's code, so they are not compared.
        levels = {2**i for i in range(len(model.channel_mult))}
        # A multi-stage configuration lists its decoders' widths; LDM's decoder is as wide as its encoder.
        stages = list(self.unet.get("de_nfs", [self.unet.get("model_channels")]))
        compared: dict[str, tuple[Any, Any]] = {
            "in_channels": (self.unet.get("in_channels"), model.in_channels),
            "out_channels": (self.unet.get("out_channels"), model.out_channels),
            "model_channels": (self.unet.get("model_channels"), model.encoder_channels),
            "de_nfs": (stages, list(model.decoder_channels)),
            "channel_mult": (list(self.unet.get("channel_mult", (1, 2, 4, 8))), list(model.channel_mult)),
            "num_res_blocks": (self.unet.get("num_res_blocks"), model.num_res_blocks),
            "attention_resolutions": (
                sorted(set(self.unet.get("attention_resolutions", [])) & levels),
                sorted(model.attention_downsamples),
            ),
            "context_dim": (_one(self.unet.get("context_dim")), model.context_dim),
            "use_scale_shift_norm": (bool(self.unet.get("use_scale_shift_norm")), model.use_scale_shift_norm),
            "resblock_updown": (bool(self.unet.get("resblock_updown")), model.resblock_updown),
            "use_linear_in_transformer": (
                bool(self.unet.get("use_linear_in_transformer")),
                model.use_linear_in_transformer,
            ),
        }
        for name, (stated, found) in compared.items():
            if stated != found:
                raise CheckpointError(
                    f"unet_config.params.{name}", stated, f"but the checkpoint's tensors have {found}",
                    f"Give the configuration that belongs to the checkpoint, not {self.path.name}.",
                )  # fmt: skip


def _one(value: Any) -> Any:
    """The item of a list of one; LDM takes either as the context's width."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
