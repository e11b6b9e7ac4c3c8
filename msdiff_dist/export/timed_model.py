"""A trained model to call from Python, with times in its process's own variable: `load_model`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from msdiff_dist.checkpoint.tensor_file import corrupt
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.export.weights import Weights, open_weights
from msdiff_dist.models.multistage_unet import MultistageUNet, build_model


class TimedModel(nn.Module):
    """A multi-stage network that chooses the stage of each sample by its time.

    Attributes:
        network: the encoder and all decoders.
        description: the model's configuration.
        process: the diffusion process, whose time variable `forward` takes.
        partition: the division of that time into stages.
    """

    def __init__(self, network: MultistageUNet, description: ModelDescription) -> None:
        super().__init__()
        self.network, self.description = network, description
        self.process, self.partition = description.process(), description.partition()

    def forward(
        self, x_BCHW: Tensor, t_B: Tensor, context: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        """The network's raw output [B, out_channels, H, W]; samples of different stages may stand in one batch.

        Args:
            x_BCHW: the network's input. No preconditioning is applied to it or to the output.
            t_B: times in the process's own variable: timestep, t or sigma.
            context: tokens [B, S, context_dim], for models that take context.
            label: classes, int64 [B], for models that have classes; `num_classes` is the dropped class.
        """
        out: Tensor = self.network(x_BCHW, self.process.network_time(t_B), self.partition.stage_of(t_B), context, label)
        return out


def load_model(path: Path | str, ema: bool = True) -> TimedModel:
    """A trained model, on the CPU, in float32 and in evaluation mode.

    Args:
        path: an export folder, a run folder (its newest checkpoint) or one checkpoint.
        ema: whether to load the averaged weights or those of the last step.

    Raises:
        CheckpointError: there are no such weights, or they are corrupt.
    """
    weights = open_weights(Path(path), ema=ema)
    with torch.device("meta"):  # without memory or initial values: `_fill` replaces every parameter
        network = build_model(weights.description.model)
    _fill(network, weights, Path(path))
    return TimedModel(network, weights.description).eval()


def _fill(network: nn.Module, weights: Weights, path: Path) -> None:
    """Replace the parameters of a network on the meta device by `weights`, one at a time.

    Raises:
        CorruptError: the weights are not those of the network.
    """
    parameters = dict(network.named_parameters())
    differing = sorted(parameters.keys() ^ set(weights.names()))
    if differing:
        raise corrupt(path, f"{len(differing)} parameters are missing or unknown, the first is {differing[0]}")
    for name, parameter in parameters.items():
        tensor = weights.tensor(name)
        if tensor.shape != parameter.shape:
            raise corrupt(path, f"{name} has shape {list(tensor.shape)} in place of {list(parameter.shape)}")
        owner, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(owner), attribute, nn.Parameter(tensor.float()))
