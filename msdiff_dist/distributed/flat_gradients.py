"""The weights and gradients of one part of the model as flat tensors, each moved by one collective.

ZeRO 1 and 2 lay the weights of a part end to end in one tensor, padded, and give each of the g ranks of its group an
equal range of it, which that rank's optimizer updates. The gradients lie here in an fp32 tensor of the same layout,
whatever the training precision: the `grad` of every parameter is a view of it, into which autograd adds. So one
reduce-scatter gives every rank the sum of its range, and one all-gather gives it the weights that the others have
updated, for any g, and each moves (g - 1) / g of a part's values.

Both run in the background. Their results are behind methods and properties that wait for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# torch 2.14 has new names for these two, and warns of the old ones.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class SumScatter:
    """The sum of `whole` over a group, of which every rank gets its own range, in the background.

    Args:
        whole: [n], n a multiple of the group's size. Not to be touched before `wait`.
    """

    def __init__(self, whole: Tensor, group: dist.ProcessGroup) -> None:
        self._size = dist.get_world_size(group)
        self._whole = whole  # kept until `wait`, as the device reads it until then
        self._work: dist.Work | None = None
        if self._size == 1:
            return
        if f"{whole.device.type}:gloo" in dist.get_backend_config(group):
            # gloo emulates a reduce-scatter by an all-reduce, which sends twice the bytes. An exchange sends the same
            # bytes as a reduce-scatter, and the terms are then added in one order whatever arrived first.
            self._received = torch.empty_like(whole)
            self._work = dist.all_to_all_single(self._received, whole, group=group, async_op=True)
        else:
            self._received = whole.new_empty(whole.numel() // self._size)
            self._work = _reduce_scatter(self._received, whole, group=group, async_op=True)

    def wait(self) -> Tensor:
        """This rank's range of the sum, [n / g]. On a GPU the stream waits, not the process."""
        if self._work is None:
            return self._whole
        self._work.wait()
        terms = self._received.view(-1, self._whole.numel() // self._size)
        return terms.sum(dim=0) if len(terms) > 1 else terms[0]


class FlatPart:
    """Flat weights, and the gradients of the parameters that are views of them.

    A step calls `open_gradients` before every backward pass, `close_gradients` after it, `take_gradient` once, and
    `publish` with the updated weights.

    Args:
        weights: [n] in the training precision, n a multiple of the group's size.
        parameters: views of `weights`; they need not cover it.
        reduce_each: reduce after every micro batch and keep this rank's range alone (ZeRO 2), instead of keeping the
            whole gradient until the last one (ZeRO 1).

    Attributes:
        own_weights: this rank's range of `weights`, [n / g].
    """

    def __init__(
        self, weights: Tensor, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, reduce_each: bool
    ) -> None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        self._weights, self._parameters, self._group = weights, parameters, group
        self._reduce_each = reduce_each and size > 1
        self.own_weights = weights.chunk(size)[rank]
        self._whole: Tensor | None = None  # this rank's own gradients of all weights, [n]
        self._reduction: SumScatter | None = None
        self._gradient: Tensor | None = None  # sums over the group of this rank's range, [n / g]
        self._gather: dist.Work | None = None
        for parameter in parameters:
            parameter.grad_dtype = None  # lets autograd add gradients in the training precision to fp32 ones

    def open_gradients(self) -> None:
        """Let the next backward pass add to the gradients."""
        self._finish_reduction()
        if self._whole is not None:
            return
        # Zeros, which remain where a parameter has no gradient, and in the padding.
        self._whole = torch.zeros(self._weights.numel(), dtype=torch.float32, device=self._weights.device)
        for p in self._parameters:
            p.grad = self._whole.as_strided(p.shape, p.stride(), p.storage_offset() - self._weights.storage_offset())

    def close_gradients(self, is_last: bool) -> None:
        """Begin the reduction, if it is due after this backward pass.

        Args:
            is_last: whether no other backward pass follows in this step.
        """
        if not is_last and not self._reduce_each:
            return
        assert self._whole is not None, "a backward pass is between `open_gradients` and `close_gradients`"
        for p in self._parameters:
            p.grad = None
        self._reduction, self._whole = SumScatter(self._whole, self._group), None

    @property
    def gradient(self) -> Tensor:
        """The sum over the group and the micro batches so far of this rank's range, fp32, [n / g]."""
        self._finish_reduction()
        assert self._gradient is not None, "the gradients have not been reduced"
        return self._gradient

    def take_gradient(self) -> Tensor:
        """`gradient`, which is not kept."""
        gradient, self._gradient = self.gradient, None
        return gradient

    def publish(self, own: Tensor) -> None:
        """Give all ranks the new weights of this rank's range, [n / g] fp32, in the background."""
        self.wait_for_weights()
        self.own_weights.copy_(own)
        if dist.get_world_size(self._group) > 1:
            self._gather = _all_gather(self._weights, self.own_weights, group=self._group, async_op=True)

    def wait_for_weights(self) -> None:
        """Wait until the weights of the other ranks have arrived. On a GPU the stream waits, not the process."""
        if self._gather is not None:
            self._gather.wait()
            self._gather = None

    def _finish_reduction(self) -> None:
        if self._reduction is None:
            return
        reduced, self._reduction = self._reduction.wait(), None
        self._gradient = reduced if self._gradient is None else self._gradient.add_(reduced)
