"""A trained model that takes times in its process's own variable."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from msdiff_dist.checkpoint.tensor_file import corrupt
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.export.weights import Weights, open_weights
from msdiff_dist.models.multistage_unet import MultistageUNet, build_model


class TimedModel(nn.Module):
    """The network's raw output for any mix of stages.

    Attributes:
        network: the whole model.
        description: what it is, with its process and its partition into stages.
    """

    def __init__(self, network: MultistageUNet, description: ModelDescription) -> None:
        super().__init__()
        self.network, self.description = network, description
        self.process, self.partition = description.process(), description.partition()

    def forward(
        self, x_BCHW: Tensor, t_B: Tensor, context: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        """Output [B, out_channels, H, W].

        Args:
            x_BCHW: the network's image input as it is: nothing is preconditioned here.
            t_B: times in the process's own variable: timestep, t or sigma.
            context: tokens [B, S, context_dim], where the model takes them.
            label: int64 [B], where the model has classes; num_classes stands for "dropped".
        """
        out: Tensor = self.network(x_BCHW, self.process.network_time(t_B), self.partition.stage_of(t_B), context, label)
        return out


def load_model(path: Path | str, ema: bool = True) -> TimedModel:
    """A ready model, on the CPU, in float32 and in evaluation mode, from an export folder.

    A run folder (its newest checkpoint) or a checkpoint will do as well.

    Args:
        ema: the average of the weights; else the last ones.

    Raises:
        CheckpointError: there are no such weights, or they are corrupt.
    """
    weights = open_weights(Path(path), ema=ema)
    with torch.device("meta"):
        network = build_model(weights.description.model)
    _fill(network, weights, Path(path))
    return TimedModel(network, weights.description).eval()


def _fill(network: nn.Module, weights: Weights, path: Path) -> None:
    """Give the parameters of a network on the meta device their values, one after the other."""
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
