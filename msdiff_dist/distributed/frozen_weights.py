"""The weights of a part that do not train: no gradients, no optimizer's state, no reduction.

Every rank of a group computes with all of them, in the training precision. A checkpoint needs them in fp32, once in a
group, so each rank answers for an equal range. In fp32 training that range is part of the weights themselves; in bf16
it is a copy in host memory, because no step on the device reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msdiff_dist.distributed.flat_gradients import FlatPart


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A range of a parameter on this rank: `numel` elements from `start` of the flattened parameter `name`. They lie at
    `offset` in the rank's flat tensor number `flat`."""

    name: str
    start: int
    numel: int
    flat: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class FrozenShards:
    """This rank's fp32 ranges of the frozen parameters of one part.

    Attributes:
        flats: 1-D tensors. Training never changes them.
        fragments: where the ranges of the parameters lie in them.
        publish: gives the network on every rank of the group these weights. Collective in the group.
        averages: averages of the weights that are other than these, by kind, each laid out as `flats`: of parameters
            that once trained. The averages of others are the weights themselves.
    """

    flats: Sequence[Tensor]
    fragments: tuple[Fragment, ...]
    publish: Callable[[], None]
    averages: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)


def frozen_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that require no gradient, by name."""
    return {name: p for name, p in module.named_parameters() if not p.requires_grad}


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that require a gradient."""
    return [p for p in module.parameters() if p.requires_grad]


def keep_whole(module: nn.Module, group: dist.ProcessGroup, dtype: torch.dtype) -> FrozenShards:
    """Lay the frozen parameters of `module`, fp32 so far, end to end in one tensor of `dtype` on every rank.

    Collective in the group: its first rank's ranges and the others' become the weights of all.
    """
    frozen, size = frozen_parameters(module), dist.get_world_size(group)
    if not frozen:
        return FrozenShards(flats=[], fragments=(), publish=lambda: None)
    shard, fragments = _own_range(frozen, group)
    own = None if dtype == torch.float32 else _copied(frozen, fragments, shard)  # before they are rounded
    whole = torch.zeros(shard * size, dtype=dtype, device=next(iter(frozen.values())).device)
    first = 0
    for p in frozen.values():
        view = whole[first : first + p.numel()].view(p.shape)
        view.copy_(p.detach())
        p.data = view
        first += p.numel()
    flat = FlatPart(whole, [], group, reduce_each=False)
    fp32 = flat.own_weights if own is None else own

    def publish() -> None:
        flat.publish(fp32)
        flat.wait_for_weights()

    publish()
    return FrozenShards(flats=[fp32], fragments=fragments, publish=publish)


def keep_aside(module: nn.Module, group: dist.ProcessGroup, averages: Collection[str] = ()) -> FrozenShards:
    """Only this rank's range of the parameters of `module`, in host memory: of a part that no rank computes.

    Args:
        averages: kinds of averages that are kept beside the weights, and begin as these.
    """
    parameters = dict(module.named_parameters())
    shard, fragments = _own_range(parameters, group)
    own = _copied(parameters, fragments, shard)
    return FrozenShards(
        flats=[own],
        fragments=fragments,
        publish=lambda: None,
        averages={kind: [own.clone()] for kind in averages},
    )


def _own_range(parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup) -> tuple[int, tuple[Fragment, ...]]:
    """The length of each rank's range of the parameters laid end to end, and what lies in this rank's."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    shard = -(-sum(p.numel() for p in parameters.values()) // size)
    low, high, first = rank * shard, (rank + 1) * shard, 0
    fragments = []
    for name, p in parameters.items():
        begin, end = max(low, first), min(high, first + p.numel())
        if begin < end:
            fragments.append(Fragment(name=name, start=begin - first, numel=end - begin, flat=0, offset=begin - low))
        first += p.numel()
    return shard, tuple(fragments)


def _copied(parameters: Mapping[str, nn.Parameter], fragments: Sequence[Fragment], shard: int) -> Tensor:
    """A copy of the fragments in host memory, fp32, [shard]."""
    own = torch.zeros(shard)
    for f in fragments:
        values = parameters[f.name].detach().flatten()[f.start : f.start + f.numel]
        own[f.offset : f.offset + f.numel].copy_(values)
    return own


def zero3_ranges(module: nn.Module, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Copies in host memory, fp32, of this rank's ranges of the frozen parameters as ZeRO 3 cuts them: each by itself.

    To be called before DeepSpeed rounds and partitions them.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    ranges: dict[str, Tensor] = {}
    for name, p in frozen_parameters(module).items():
        shard = -(-p.numel() // size)
        values = p.detach().flatten()[rank * shard : (rank + 1) * shard]
        ranges[name] = torch.zeros(shard)
        ranges[name][: values.numel()].copy_(values)
    return ranges


def keep_in_zero3(module: nn.Module, group: dist.ProcessGroup, masters: dict[str, Tensor] | None) -> FrozenShards:
    """The frozen parameters of a module that DeepSpeed has partitioned: sharded, and gathered where they are used.

    Args:
        masters: what `zero3_ranges` gave; None: the partitions are fp32 themselves.
    """
    rank = dist.get_rank(group)
    frozen = frozen_parameters(module)
    partitions = [p.ds_tensor.data for p in frozen.values()]  # type: ignore[attr-defined]
    flats = list(masters.values()) if masters is not None else partitions
    fragments = []
    for i, (name, p) in enumerate(frozen.items()):
        start = rank * flats[i].numel()
        numel = min(flats[i].numel(), p.ds_numel - start)  # type: ignore[attr-defined]
        if numel > 0:
            fragments.append(Fragment(name=name, start=start, numel=numel, flat=i, offset=0))

    def publish() -> None:
        for partition, flat in zip(partitions, flats, strict=True):
            partition.copy_(flat)

    return FrozenShards(flats=flats, fragments=tuple(fragments), publish=publish)
