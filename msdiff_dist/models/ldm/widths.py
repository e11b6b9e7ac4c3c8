"""A decoder's weights at another width, so that a multi-stage model can start from a unified one.

Channel i of n' copies channel floor(i n / n') of n. Norm groups are consecutive channels, so a channel keeps its place
in its group.

- Wider: channels are repeated, and the layer that reads them divides by the number of copies. It reads the same sum;
  only the statistics of norms whose groups mix repeated channels with channels of the encoder change.
- Narrower: evenly spread channels are kept together with the weights that read them. That is the least-squares choice
  where channels do not correlate.
- Attention repeats or keeps whole heads, or the channels inside a head where the number of heads is fixed. Queries are
  scaled so that the logits, which are divided by the square root of a head's width, stay the same.

Where width and heads are equal, every weight is copied unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from msdiff_dist.errors import ConfigError
from msdiff_dist.models.ldm.config import LDMConfig
from msdiff_dist.models.resizing import Channels, Resized


def resized_decoder(old: LDMConfig, new: LDMConfig, stage: int) -> dict[str, Resized | None]:
    """How each parameter of decoder `stage` of `new` is made from the only decoder of `old`.

    None marks the parameters of attention layers that the old decoder does not have. They keep their first weights,
    with which such a layer adds nothing.

    Raises:
        ConfigError: a block has a shortcut layer in one of the two decoders only.
    """
    return dict(_Decoder(old, new, stage).parameters())


class _Decoder:
    """Walks the up path of both decoders in step, with the channels that each layer reads and makes."""

    def __init__(self, old: LDMConfig, new: LDMConfig, stage: int) -> None:
        self.old, self.new, self.stage = old, new, stage
        self.same = (
            old.decoder_channels[0] == new.decoder_channels[stage]
            and (old.num_heads, old.num_head_channels) == (new.num_heads, new.num_head_channels)
        )  # fmt: skip

    def parameters(self) -> Iterator[tuple[str, Resized | None]]:
        blocks = list(zip(self.old.up_blocks(0), self.new.up_blocks(self.stage), strict=True))
        # The path begins with the encoder's channels, which do not change; each block then replaces it by its own.
        deepest = self.old.down_blocks(0)[-1].out_channels
        path, path_old, width = Channels.resized(deepest, deepest), deepest, Channels.resized(1, 1)
        for i, (was, now) in enumerate(blocks):
            # A block reads the path and one skip, concatenated; only the path is resized.
            skip = was.in_channels - path_old
            read = Channels.joined([(path, path_old), (Channels.resized(skip, skip), skip)])
            width = Channels.resized(was.out_channels, now.out_channels)
            place = f"output_blocks.{i}"
            yield from self._resnet(f"{place}.0", f"{place}.0", read, width, was.out_channels)
            if (was.in_channels == was.out_channels) != (now.in_channels == now.out_channels):
                raise ConfigError(
                    "decoder_channels", self.new.decoder_channels[self.stage],
                    f"gives block {i} a shortcut layer where the unified model's block {i} has none, or the reverse",
                    "Use another width.",
                )  # fmt: skip
            if was.in_channels != was.out_channels:
                yield from self._layer(f"{place}.0.skip_connection", f"{place}.0.skip_connection", width, read)
            attended = was.downsampling in self.old.attention_of(0)
            attends = now.downsampling in self.new.attention_of(self.stage)
            if attends:
                layers = self._attention(f"{place}.1", width, was.out_channels, now.out_channels)
                yield from layers if attended else ((name, None) for name, _ in layers)
            if was.resamples:
                # The upsampling layer is the block's last, after its attention if it has some.
                before, after = f"{place}.{2 if attended else 1}", f"{place}.{2 if attends else 1}"
                if self.new.resblock_updown:
                    yield from self._resnet(after, before, width, width, was.out_channels)
                else:
                    yield from self._layer(f"{after}.conv", f"{before}.conv", width, width)
            path, path_old = width, was.out_channels
        yield from self._norm("out.0", "out.0", width)
        yield from self._layer("out.2", "out.2", None, width)

    def _resnet(self, new: str, old: str, read: Channels, width: Channels, width_old: int) -> Iterator[_Item]:
        """A `ResBlock` called `new`, `old` in the old decoder, without its shortcut layer."""
        emb = width.twice(width_old) if self.new.use_scale_shift_norm else width
        yield from self._norm(f"{new}.in_layers.0", f"{old}.in_layers.0", read)
        yield from self._layer(f"{new}.in_layers.2", f"{old}.in_layers.2", width, read)
        yield from self._layer(f"{new}.emb_layers.1", f"{old}.emb_layers.1", emb, None)
        yield from self._norm(f"{new}.out_layers.0", f"{old}.out_layers.0", width)
        yield from self._layer(f"{new}.out_layers.3", f"{old}.out_layers.3", width, width)

    def _attention(self, place: str, width: Channels, old: int, new: int) -> Iterator[_Item]:
        """The attention layer at `place`, from `old` channels to `new`."""
        heads = (self.old.heads(old), self.new.heads(new))
        inner, queries = _heads(heads, (old // heads[0], new // heads[1]))
        if self.new.context_dim is None:
            joint = _joint_rows(inner, queries, heads, old, new, self.new.legacy_attention_order)
            yield from self._norm(f"{place}.norm", f"{place}.norm", width)
            yield from self._layer(f"{place}.qkv", f"{place}.qkv", joint, width)
            yield from self._layer(f"{place}.proj_out", f"{place}.proj_out", width, inner)
            return
        yield from self._norm(f"{place}.norm", f"{place}.norm", width)
        yield from self._layer(f"{place}.proj_in", f"{place}.proj_in", width, width)
        wide = Channels.resized(4 * old, 4 * new)
        for i in range(self.new.transformer_depth):
            block = f"{place}.transformer_blocks.{i}"
            # attn1 attends to the pixels, attn2 to the context, whose width does not change.
            for attention, read in (("attn1", width), ("attn2", None)):
                for name, rows, columns in (("to_q", queries, width), ("to_k", inner, read), ("to_v", inner, read)):
                    weight = f"{block}.{attention}.{name}.weight"
                    yield weight, self._resized(weight, rows, columns)
                out = f"{block}.{attention}.to_out.0"
                yield from self._layer(out, out, width, inner)
            yield from self._layer(f"{block}.ff.net.0.proj", f"{block}.ff.net.0.proj", wide.twice(4 * old), width)
            yield from self._layer(f"{block}.ff.net.2", f"{block}.ff.net.2", width, wide)
            for norm in ("norm1", "norm2", "norm3"):
                yield from self._norm(f"{block}.{norm}", f"{block}.{norm}", width)
        yield from self._layer(f"{place}.proj_out", f"{place}.proj_out", width, width)

    def _norm(self, new: str, old: str, channels: Channels) -> Iterator[_Item]:
        for kind in ("weight", "bias"):
            yield f"{new}.{kind}", self._resized(f"{old}.{kind}", channels, None)

    def _layer(self, new: str, old: str, rows: Channels | None, columns: Channels | None) -> Iterator[_Item]:
        yield f"{new}.weight", self._resized(f"{old}.weight", rows, columns)
        yield f"{new}.bias", self._resized(f"{old}.bias", rows, None)

    def _resized(self, name: str, rows: Channels | None, columns: Channels | None) -> Resized:
        return Resized(name) if self.same else Resized(name, rows, columns)


_Item = tuple[str, Resized | None]


def _heads(heads: tuple[int, int], dims: tuple[int, int]) -> tuple[Channels, Channels]:
    """(channels of keys and values, channels of queries with their scale), head by head.

    Args:
        heads: number of heads, old and new.
        dims: channels of a head, old and new.
    """
    head, dim = Channels.resized(*heads), Channels.resized(*dims)
    source = (head.source[:, None] * dims[0] + dim.source).flatten()
    reads = (head.reads[:, None] * dim.reads).flatten()
    # A product over a head's channels counts each old channel as often as it is copied, and attention then divides by
    # sqrt(dims): both are undone in the queries.
    scale = (dim.reads * math.sqrt(dims[1] / dims[0])).repeat(heads[1])
    return Channels(source, reads, torch.ones(len(source))), Channels(source, reads, scale)


def _joint_rows(
    inner: Channels, queries: Channels, heads: tuple[int, int], old: int, new: int, heads_first: bool
) -> Channels:
    """Rows of the layer `qkv`, which makes queries, keys and values; `heads_first` is `legacy_attention_order`."""
    if not heads_first:
        return Channels.joined([(queries, old), (inner, old), (inner, old)])
    # Heads first: row (head * 3 + which) * dim + place holds channel `place` of q, k or v of that head.
    dim_old, dim_new = old // heads[0], new // heads[1]
    head, place = inner.source // dim_old, inner.source % dim_old
    by_head = [(head * 3 + which) * dim_old + place for which in range(3)]
    writes = [queries.writes, inner.writes, inner.writes]
    source, reads, scale = (
        torch.stack([t.view(heads[1], dim_new) for t in parts], 1).flatten()
        for parts in (by_head, [inner.reads] * 3, writes)
    )
    return Channels(source, reads, scale)
