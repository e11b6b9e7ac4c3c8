"""This rank's fp32 shards of one ZeRO engine, by parameter name: the view that averages and checkpoints use.

ZeRO keeps the fp32 weights and the optimizer's moments of a rank in flat tensors. A fragment says which range of which
flattened parameter lies where in them, so that state can leave one layout and enter another by name. DeepSpeed has no
public interface to this; the private members that are used here are checked by tests/unit/test_private_members.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msdiff_dist.distributed.frozen_weights import Fragment, FrozenShards


class ShardedState:
    """The flat fp32 tensors of one part on this rank, and the fragments in them.

    Args:
        module: the engine's module.
        optimizer: DeepSpeed's ZeRO optimizer over its parameters; None: none of them trains.
        publish: gives the network on every rank of the group the weights of the fp32 shards.
        frozen: the parameters that do not train.
        gathered: gradients that wait for those of later batches, one tensor for each of `flats`; empty: none ever do.

    Attributes:
        shapes: shape of every whole parameter of the module, by name.
        trained: names of the parameters that train.
        fragments: where this rank's ranges of these lie. ZeRO's padding belongs to no fragment.
        frozen: the others, which have no moments, and whose averages are the weights themselves.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Any,
        publish: Callable[[], None],
        frozen: FrozenShards,
        gathered: Sequence[Tensor] = (),
    ) -> None:
        self._optimizer, self._publish, self.frozen, self.gathered = optimizer, publish, frozen, gathered
        self._is_zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self.shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in module.named_parameters()}
        self.trained = tuple(n for n, p in module.named_parameters() if p.requires_grad)
        self.fragments = tuple(self._find_fragments(module))

    def flats(self) -> list[Tensor]:
        """The fp32 weights that train: the 1-D tensors that the optimizer updates in place."""
        if self._optimizer is None:
            return []
        if self._is_zero3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def moments(self) -> list[dict[str, Tensor]]:
        """For each flat tensor, the optimizer's tensors of the same shape by kind; empty before the first step."""
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
        """Fill the fp32 weights and the moments, then the network's own weights from them.

        Collective in the engine's group: the network's weights are gathered from the shards.

        Args:
            read: (kind, fragment) -> the fragment's elements of that kind, float32 [numel].
            moments: kinds of the optimizer's tensors to fill.
            optimizer_steps: steps that the optimizer has taken, for Adam's bias correction.
        """
        flats = self.flats()
        for flat in flats:
            state = self._optimizer.optimizer.state[flat]
            for kind in moments:
                state[kind] = torch.zeros_like(flat, requires_grad=False)
            if moments:  # torch's SGD counts no steps and ignores an entry `step`
                state["step"] = torch.tensor(float(optimizer_steps), device=flat.device if self._fused() else "cpu")
        for f in self.fragments:
            where = slice(f.offset, f.offset + f.numel)
            flats[f.flat][where].copy_(read("param", f))
            for kind in moments:
                self._optimizer.optimizer.state[flats[f.flat]][kind][where].copy_(read(kind, f))
        for f in self.frozen.fragments:
            self.frozen.flats[f.flat][f.offset : f.offset + f.numel].copy_(read("param", f))
        self._publish()
        self.frozen.publish()

    def _fused(self) -> bool:
        return bool(self._optimizer.optimizer.param_groups[0].get("fused"))

    def _find_fragments(self, module: nn.Module) -> Iterator[Fragment]:
        opt = self._optimizer
        parameters: Iterator[tuple[str, Any]] = module.named_parameters()
        for name, p in parameters:
            if not p.requires_grad:
                continue
            if self._is_zero3:  # each parameter is cut into equal ranges, one per rank
                flat, offset, numel = opt.grad_position[opt.get_param_id(p)]
                start = opt._get_param_partition_rank(p) * numel
                numel = min(numel, p.ds_numel - start)  # the last ranges are padded
                if numel > 0:
                    yield Fragment(name=name, start=start, numel=numel, flat=flat, offset=offset)
            elif p._hp_mapping is not None:  # ZeRO 1 and 2 cut all parameters joined; None: this rank has none of it
                m = p._hp_mapping
                low, high = m.lp_fragment_address, m.hp_fragment_address
                yield Fragment(name=name, start=low.start, numel=low.numel, flat=m.param_group_index, offset=high.start)
