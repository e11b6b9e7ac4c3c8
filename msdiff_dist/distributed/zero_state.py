"""This rank's fp32 shards of one ZeRO engine, seen by parameter name: the view that EMA and checkpoints use.

ZeRO keeps the fp32 weights and the optimizer's moments of a rank in flat tensors. A fragment says which stretch of
which flattened parameter lies where in them, so that state can leave one layout and enter another by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """`numel` elements from `start` of the flattened parameter `name`, at `offset` of the rank's flat tensor `flat`."""

    name: str
    start: int
    numel: int
    flat: int
    offset: int


class ShardedState:
    """The flat fp32 tensors of one engine on this rank, and their fragments."""

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._is_zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self.shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in module.named_parameters()}
        self.fragments = tuple(self._find_fragments(module))

    def flats(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer steps in place."""
        if self._is_zero3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def moments(self) -> list[dict[str, Tensor]]:
        """For each flat tensor, the optimizer's tensors of the same shape; empty before the first step."""
        return [
            {
                k: v
                for k, v in self._optimizer.optimizer.state.get(f, {}).items()
                if torch.is_tensor(v) and v.shape == f.shape
            }
            for f in self.flats()
        ]

    @torch.no_grad()
    def restore(self, read: Callable[[str, Fragment], Tensor], moments: list[str], optimizer_steps: int) -> None:
        """Fill the fp32 weights and the named moments from `read(kind, fragment)`, then the network's own weights.

        Collective in the engine's group: weights are gathered from the shards.
        """
        flats = self.flats()
        for flat in flats:
            state = self._optimizer.optimizer.state[flat]
            for kind in moments:
                state[kind] = torch.zeros_like(flat, requires_grad=False)
            if moments:  # torch's SGD alone counts no steps, and does not look for the count
                state["step"] = torch.tensor(float(optimizer_steps), device=flat.device if self._fused() else "cpu")
        for f in self.fragments:
            where = slice(f.offset, f.offset + f.numel)
            flats[f.flat][where].copy_(read("param", f))
            for kind in moments:
                self._optimizer.optimizer.state[flats[f.flat]][kind][where].copy_(read(kind, f))
        self._publish(bool(moments))

    def _fused(self) -> bool:
        return bool(self._optimizer.optimizer.param_groups[0].get("fused"))

    def _publish(self, has_moments: bool) -> None:
        opt = self._optimizer
        if self._is_zero3:
            for i in range(len(opt.fp16_groups)):
                opt._reassign_or_swap_out_partitioned_parameters(i)
            if opt.persistent_parameters:
                opt.persistent_parameters[0].partition(opt.persistent_parameters)
                opt.persistent_parameters[0].all_gather(opt.persistent_parameters)
        else:
            if has_moments:
                opt._lazy_init_hp_params_optimizer_state()
            opt.update_lp_params()

    def _find_fragments(self, module: nn.Module) -> Iterator[Fragment]:
        opt = self._optimizer
        parameters: Iterator[tuple[str, Any]] = module.named_parameters()
        for name, p in parameters:
            if self._is_zero3:
                flat, offset, numel = opt.grad_position[opt.get_param_id(p)]
                start = opt._get_param_partition_rank(p) * numel
                numel = min(numel, p.ds_numel - start)  # the last rank's part is padded
                if numel > 0:
                    yield Fragment(name=name, start=start, numel=numel, flat=flat, offset=offset)
            elif p._hp_mapping is not None:
                m = p._hp_mapping
                low, high = m.lp_fragment_address, m.hp_fragment_address
                yield Fragment(name=name, start=low.start, numel=low.numel, flat=m.param_group_index, offset=high.start)
