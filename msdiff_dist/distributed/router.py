"""Takes every sample from the rank that read it to a rank that holds its stage's decoder, before the shared encoder.

Stage, micro batch and reader of every sample of a global batch are known to every rank. So each rank computes the
destinations of all samples by itself, no counts are exchanged, and one `all_to_all_single` of packed rows per micro
batch is enough.

Suffixes of arrays: B samples of a global batch, n samples of one micro batch on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from msdiff_dist.distributed.placement import Placement

if TYPE_CHECKING:
    from msdiff_dist.data.step_samples import StepSamples


Format = tuple[torch.dtype, torch.Size]
"""Type and shape of one sample's x, label or context."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Where each sample of one global batch comes from and goes to; the same on every rank.

    Attributes:
        stage_B, micro_B: int64, stage and micro batch of each sample, by its index in the global batch.
        source_B: int64, the rank that read each sample.
        placement: how many samples of each micro batch and stage each rank computes.
    """

    stage_B: np.ndarray
    micro_B: np.ndarray
    source_B: np.ndarray
    placement: Placement

    @cached_property
    def dest_B(self) -> np.ndarray:
        """int64, the rank that computes each sample: its reader where the placement allows it.

        Of the samples of one micro batch and stage, a rank keeps the first ones that it read, as many as it is to
        compute. The others, ordered by reader and index, go to the ranks with places left, in order of rank.
        """
        # A cell is one (micro batch, stage, rank), numbered in this order. A stable sort by the cell of the reader puts
        # the samples of a cell side by side, in order of index; the first `planned` of each cell stay.
        planned_AWK = self.placement.samples_AWK
        accumulation, world_size, num_stages = planned_AWK.shape
        planned = planned_AWK.transpose(0, 2, 1).ravel()  # by cell: micro batch, stage, rank
        cell_B = (self.micro_B * num_stages + self.stage_B) * world_size + self.source_B
        order = cell_B.argsort(kind="stable")
        read = np.bincount(cell_B, minlength=len(planned))
        nth_in_cell = np.arange(len(order)) - (read.cumsum() - read).repeat(read)  # position less that of the cell
        assert np.array_equal(*(n.reshape(-1, world_size).sum(axis=1) for n in (read, planned))), (
            "not the plan's quotas"
        )
        kept = nth_in_cell < planned.repeat(read)
        # The samples that leave their reader stand in order of micro batch, stage, reader and index. The free places
        # stand in order of micro batch, stage and rank. Every micro batch and stage has as many of these as of those,
        # so the two lists match element by element.
        places = planned - np.minimum(planned, read)
        dest_B = self.source_B.copy()
        dest_B[order[~kept]] = np.tile(np.arange(world_size), accumulation * num_stages).repeat(places)
        return dest_B

    def sent(self, rank: int, micro: int) -> np.ndarray:
        """Indices in the global batch of the samples that `rank` sends, to itself too: by destination, then index."""
        index_n = np.flatnonzero((self.source_B == rank) & (self.micro_B == micro))
        return index_n[self.dest_B[index_n].argsort(kind="stable")]

    def received(self, rank: int, micro: int) -> np.ndarray:
        """Indices in the global batch of the samples that arrive at `rank`: by source, then index."""
        index_n = np.flatnonzero((self.dest_B == rank) & (self.micro_B == micro))
        return index_n[self.source_B[index_n].argsort(kind="stable")]


@dataclass(frozen=True, kw_only=True)
class RoutedBatch:
    """The samples of one micro batch on one rank, sorted by stage, then index.

    Attributes:
        index_n: int64, index in the global batch.
        stage_n: int64, as many of each stage as the placement says.
        x_nCHW, label_n, context_nTC: as they were read, on the router's device; None where the data have none.
    """

    index_n: np.ndarray
    stage_n: np.ndarray
    x_nCHW: Tensor
    label_n: Tensor | None
    context_nTC: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """What one rank sends in the exchange of one micro batch, and what it knows of the samples that it will receive.

    Attributes:
        packed: uint8 [rows, bytes], the samples to send, by destination; page-locked memory for exchanges on GPUs.
        rows_to_W, rows_from_W: number of rows to and from every rank.
        index_n, stage_n: int64, index in the global batch and stage of the samples to receive, sorted by stage, then
            index.
        order_n: int64, their places among the rows as they arrive.
        formats: types and shapes of the samples' fields.
    """

    packed: Tensor
    rows_to_W: list[int]
    rows_from_W: list[int]
    index_n: np.ndarray
    stage_n: np.ndarray
    order_n: Tensor
    formats: list[Format | None]


class Router:
    """Exchanges the samples of one micro batch after another.

    Args:
        group: a process group of all ranks that nothing else uses, so that an exchange under way does not wait for the
            collectives of training, nor delay them.

    Attributes:
        device: where the exchange takes place and the samples arrive: the CPU with gloo, the rank's GPU with NCCL.
        bytes_sent: payload bytes this rank has sent to other ranks so far.
    """

    def __init__(self, group: dist.ProcessGroup, placement: Placement, rank: int, device: torch.device) -> None:
        self.placement, self.device = placement, device
        self.bytes_sent = 0
        self._group, self._rank = group, rank

    def pack(self, assignment: Assignment, micro: int, samples: StepSamples) -> Outgoing:
        """Make ready what this rank sends of one micro batch. All of it is work of the host, and any thread may do it.

        Args:
            samples: all samples of the global batch that this rank read, in ascending order of index; perhaps none.
        """
        world_size, pinned = self.placement.world_size, self.device.type == "cuda"
        out_n, in_n = assignment.sent(self._rank, micro), assignment.received(self._rank, micro)
        row_n = np.searchsorted(samples.index_n, out_n)
        assert np.array_equal(samples.index_n[row_n], out_n)
        # Sorted by stage, then index (lexsort's last key counts first): so each held stage is one slice of rows, and
        # sums over rows do not depend on which rank read them.
        stage_n = assignment.stage_B[in_n]
        order_n = np.lexsort((in_n, stage_n))
        order = torch.from_numpy(order_n)
        fields = [samples.x_nCHW, samples.label_n, samples.context_nTC]
        return Outgoing(
            # One exchange of bytes carries samples, labels and contexts: a collective costs more than a label's bytes.
            packed=_packed([field for field in fields if field is not None], row_n, pinned),
            rows_to_W=np.bincount(assignment.dest_B[out_n], minlength=world_size).tolist(),
            rows_from_W=np.bincount(assignment.source_B[in_n], minlength=world_size).tolist(),
            index_n=in_n[order_n],
            stage_n=stage_n[order_n],
            order_n=order.pin_memory() if pinned else order,
            formats=[None if field is None else (field.dtype, field.shape[1:]) for field in fields],
        )

    def start(self, outgoing: Outgoing) -> PendingBatch:
        """Begin the exchange of one micro batch.

        Collective: every rank begins the same exchanges in the same order, from its main thread.
        """
        sent = outgoing.packed.to(self.device, non_blocking=True)
        incoming = sent.new_empty(len(outgoing.index_n), sent.shape[1])
        work = dist.all_to_all_single(
            incoming, sent, outgoing.rows_from_W, outgoing.rows_to_W, group=self._group, async_op=True
        )
        assert work is not None
        self.bytes_sent += (len(sent) - outgoing.rows_to_W[self._rank]) * sent.shape[1]
        return PendingBatch(work, outgoing, sent, incoming)


class PendingBatch:
    """An exchange under way. It holds the buffers being sent until `wait` returns."""

    def __init__(self, work: dist.Work, outgoing: Outgoing, sent: Tensor, incoming: Tensor) -> None:
        self._work, self._outgoing, self._incoming = work, outgoing, incoming
        self._sent: Tensor | None = sent

    def wait(self) -> RoutedBatch:
        """The samples, once they have all arrived. Call it once. On a GPU the stream waits, and not the host."""
        self._work.wait()
        self._sent = None
        outgoing = self._outgoing
        rows = self._incoming.index_select(0, outgoing.order_n.to(self._incoming.device, non_blocking=True))
        x_nCHW, label_n, context_nTC = _unpacked(rows, outgoing.formats)
        assert x_nCHW is not None
        return RoutedBatch(
            index_n=outgoing.index_n,
            stage_n=outgoing.stage_n,
            x_nCHW=x_nCHW,
            label_n=label_n,
            context_nTC=context_nTC,
        )


def _packed(fields: list[Tensor], row_n: np.ndarray, pinned: bool = False) -> Tensor:
    """The bytes of the given rows of all fields side by side, uint8 [n, bytes], in page-locked memory if `pinned`."""
    bytes_of = [field.shape[1:].numel() * field.dtype.itemsize for field in fields]
    packed = torch.empty(len(row_n), sum(bytes_of), dtype=torch.uint8, pin_memory=pinned)
    first, out = 0, packed.numpy()
    for field, size in zip(fields, bytes_of, strict=True):
        rows = field.reshape(len(field), field.shape[1:].numel()).view(torch.uint8).numpy()
        out[:, first : first + size] = rows[row_n]
        first += size
    return packed


def _unpacked(rows: Tensor, formats: list[Format | None]) -> list[Tensor | None]:
    """The inverse of `_packed`; None for each format that is None."""
    fields: list[Tensor | None] = []
    first = 0
    for one in formats:
        if one is None:
            fields.append(None)
            continue
        dtype, shape = one
        end = first + shape.numel() * dtype.itemsize
        # A copy, since a view as `dtype` needs bytes that are aligned. `contiguous` would not copy a single row.
        own = rows[:, first:end].clone(memory_format=torch.contiguous_format)
        fields.append(own.view(dtype).reshape(len(rows), *shape))
        first = end
    return fields
