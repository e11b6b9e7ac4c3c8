"""DeepSpeed checkpoint folders: the fp32 weights of a ZeRO engine, put together from the ranks' partitions.

FOLDER/latest                                       the newest tag
FOLDER/TAG/mp_rank_00_model_states.pt               ZeRO 0-2: weights as computed with, shapes, buffers
FOLDER/TAG/zero_pp_rank_R_mp_rank_00_model_states.pt    the same for each rank, ZeRO 3
FOLDER/TAG/zero_pp_rank_R_mp_rank_00_optim_states.pt    rank R's part of the flattened fp32 weights

Numbers after ZeRO are its levels. Files are mapped, so that memory stays that of one tensor. Neither deepspeed nor a
GPU is needed.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdiff_dist.checkpoint.layout import INDEX
from msdiff_dist.convert.formats.diffusers_folder import read_unet
from msdiff_dist.convert.formats.export_folder import read_run
from msdiff_dist.convert.formats.ldm import CLASS_TABLE, UNET, read_ldm
from msdiff_dist.convert.formats.model_folder import json_of
from msdiff_dist.convert.model_weights import ModelWeights
from msdiff_dist.convert.options import ConvertOptions, refuse_unused
from msdiff_dist.convert.recognition import format_of
from msdiff_dist.convert.tensor_sources import RenamedSource, TensorSource, load_pickle
from msdiff_dist.errors import CheckpointError

_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")


def read_deepspeed(folder: Path, options: ConvertOptions) -> ModelWeights:
    """A DeepSpeed folder of a network that this package has, recognised by its parameters' names; or a run folder.

    Raises:
        CheckpointError: the folder is incomplete, or holds another network (`--to safetensors` writes any).
    """
    from msdiff_dist.convert.formats import FORMATS  # here, since that table holds this reader

    if (folder / INDEX).exists() or (folder / "checkpoints").is_dir():
        refuse_unused(options, ("weights",), "a run folder of this package")
        return read_run(folder, options)
    source = DeepspeedSource(folder)
    format_name = format_of(source.names())
    if format_name == "msdiff":
        # A network of this package, without its recipe: read like the official multi-stage code's, which differs in
        # names alone. The report then names the keys as they are in the folder.
        found = read_ldm(_as_official(source), options, multistage=True)
        own = {theirs: ours for ours, theirs in _official_names(source).items()}
        return replace(
            found,
            used={own.get(k, k): names for k, names in found.used.items()},
            left_out={own.get(k, k): reason for k, reason in found.left_out.items()},
        )
    if format_name == "diffusers" and options.config is not None:
        refuse_unused(options, ("config", "boundaries", "prediction_type", "scale_factor"), "a network of diffusers")
        return read_unet(json_of(options.config), source, options)
    read_tensors = FORMATS[format_name].read_tensors if format_name else None
    if format_name is not None and read_tensors is not None:
        refuse_unused(options, FORMATS[format_name].read_options, f"a network of format {format_name}")
        return read_tensors(source, options)
    hint = "Give its config.json with --config" if format_name == "diffusers" else "Use --to safetensors"
    raise CheckpointError(
        "--from", "deepspeed", f"the parameters ({source.names()[0]}, ...) do not show which network they are of",
        f"{hint}.",
    )  # fmt: skip


class DeepspeedSource(TensorSource):
    """The weights of a DeepSpeed engine under its own names, fp32 where ZeRO keeps them so.

    Every tensor is a list of pieces: ranges of the ranks' mapped files that are joined when it is read.

    Raises:
        CheckpointError: a rank's file is missing or corrupt, or the model is split other than by ZeRO.
    """

    def __init__(self, folder: Path) -> None:
        folder = _tag_folder(folder)
        models, optimizers = _by_rank(folder, _MODEL), _by_rank(folder, _OPTIMIZER)
        if not models:
            raise CheckpointError("SRC", str(folder), "holds no *_model_states.pt", "Name a DeepSpeed checkpoint.")
        self.files = (*models.values(), *optimizers.values())
        states = {rank: load_pickle(path) for rank, path in models.items()}
        self._pieces: dict[str, list[Tensor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        first = states[min(states)]
        if optimizers:
            _check_ranks(optimizers, folder)
            # The weights of mixed precision are copies in half precision; the optimizer's are the exact ones.
            shards = [load_pickle(path)["optimizer_state_dict"] for path in optimizers.values()]
            self._add_partitions(first["param_shapes"], shards)
            self._add_frozen(list(states.values()))
        self._add_rest(first, bool(optimizers))
        reason = "state of the optimizer and the engine, no weights"
        self.left_out = {f"{name}": reason for name in first if name not in ("module", "buffer_names")}
        self.left_out |= self._without_values(first)

    def names(self) -> list[str]:
        return list(self._shapes)

    def meta(self, key: str) -> Tensor:
        return torch.empty(self._shapes[key], dtype=self._pieces[key][0].dtype, device="meta")

    def read(self, key: str) -> Tensor:
        pieces = self._pieces[key]
        flat = pieces[0].reshape(-1) if len(pieces) == 1 else torch.cat([p.reshape(-1) for p in pieces])
        # ZeRO 3 pads the last rank's piece.
        return flat[: math.prod(self._shapes[key])].view(self._shapes[key])

    def _add(self, name: str, shape: Sequence[int], pieces: list[Tensor]) -> None:
        """Add a tensor that its pieces, flattened and joined, begin with."""
        found = sum(p.numel() for p in pieces)
        if found < math.prod(shape):
            raise CheckpointError(
                name, list(shape), f"has {found} of {math.prod(shape)} elements in the ranks' files",
                "Use a checkpoint that was written completely.",
            )  # fmt: skip
        self._shapes[name], self._pieces[name] = tuple(shape), pieces

    def _add_partitions(self, groups: Sequence[Mapping[str, Sequence[int]]], shards: list[Mapping[str, Any]]) -> None:
        """Add the weights that ZeRO divides among the ranks.

        Args:
            groups: for each of the optimizer's parameter groups, the shapes by name, in the engine's order.
            shards: the optimizer's state on each rank.
        """
        if "fp32_flat_groups" in shards[0]:
            self._add_whole_partitions(groups, [_tensors(s["fp32_flat_groups"]) for s in shards])
        elif "param_slice_mappings" in shards[0]:
            self._add_mapped_ranges(groups, shards)
        else:
            self._add_consecutive(groups, [_tensors(s["single_partition_of_fp32_groups"]) for s in shards])

    def _add_whole_partitions(self, groups: Sequence[Mapping[str, Sequence[int]]], ranks: list[list[Tensor]]) -> None:
        """ZeRO 3: every parameter is divided among all ranks in equal parts, the last one padded."""
        cursors = [_Cursor(flats) for flats in ranks]
        for name, shape in (item for group in groups for item in group.items()):
            length = math.ceil(math.prod(shape) / len(ranks))
            self._add(name, shape, [piece for cursor in cursors for piece in cursor.take(length)])

    def _add_mapped_ranges(
        self, groups: Sequence[Mapping[str, Sequence[int]]], shards: list[Mapping[str, Any]]
    ) -> None:
        """ZeRO 1 and 2: each rank records which range of its flat tensor holds elements of which parameter."""
        pieces: dict[str, list[Tensor]] = defaultdict(list)
        for shard in shards:
            flats = _tensors(shard["single_partition_of_fp32_groups"])
            for flat, mapping in zip(flats, shard["param_slice_mappings"], strict=True):
                for name, place in mapping.items():
                    start = place.fields["start"]
                    pieces[name].append(flat[start : start + place.fields["numel"]])
        for name, shape in (item for group in groups for item in group.items()):
            self._add(name, shape, pieces[name])

    def _add_consecutive(self, groups: Sequence[Mapping[str, Sequence[int]]], ranks: list[list[Tensor]]) -> None:
        """ZeRO 1 and 2 of older versions: the ranks' flat tensors, joined, hold a group's parameters in order."""
        for i, group in enumerate(groups):
            cursor = _Cursor([flats[i] for flats in ranks])
            for name, shape in group.items():
                self._add(name, shape, cursor.take(math.prod(shape)))

    def _add_frozen(self, states: list[Mapping[str, Any]]) -> None:
        """Add parameters that are not trained, which no optimizer holds."""
        for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
            self._add(name, shape, [state["frozen_param_fragments"][name] for state in states])

    def _add_rest(self, state: Mapping[str, Any], partitioned: bool) -> None:
        """Add what the module itself holds: second names of shared parameters, buffers, weights outside ZeRO."""
        for name, original in (state.get("shared_params") or {}).items():
            self._shapes[name], self._pieces[name] = self._shapes[original], self._pieces[original]
        # Under ZeRO 3 the module's parameters are empty and only its buffers have values.
        is_zero3 = partitioned and any(p.numel() == 0 for p in state["module"].values())
        for name in state.get("buffer_names") or [] if is_zero3 else state["module"]:
            tensor = state["module"].get(name)
            if isinstance(tensor, Tensor) and name not in self._shapes:
                self._add(name, tensor.shape, [tensor])

    def _without_values(self, state: Mapping[str, Any]) -> dict[str, str]:
        """Parameters of the module that nothing above has added, as in `left_out`."""
        # ZeRO 3 saves a parameter that has two names under one, and does not save which two are the same.
        reason = "has no values of its own in the checkpoint: it is shared with another parameter"
        return {name: reason for name in state["module"] if name not in self._shapes}


def _official_names(source: TensorSource) -> dict[str, str]:
    """For each of our parameters' names, the name of the same parameter in the official multi-stage code."""
    places = {"output_blocks": "de_modules", "out": "outs"}
    names = {}
    for key in source.names():
        part, _, rest = key.partition(".")
        if part == "stages":
            stage, block, rest = rest.split(".", 2)
            rest = f"{places.get(block, block)}.{stage}.{rest}"
        names[key] = UNET + rest
    table = "shared.label_emb.weight"
    if table in names and source.meta(table).shape[1] != source.meta("shared.time_embed.2.bias").shape[0]:
        # A table as wide as the time embedding is added to it; of another width, its rows are context tokens, which LDM
        # keeps outside the network.
        names[table] = CLASS_TABLE
    return names


def _as_official(source: TensorSource) -> RenamedSource:
    return RenamedSource(source, {theirs: ours for ours, theirs in _official_names(source).items()})


class _Cursor:
    """Takes ranges from several flat tensors as if they were joined."""

    def __init__(self, flats: list[Tensor]) -> None:
        self._flats, self._at = flats, 0

    def take(self, numel: int) -> list[Tensor]:
        """Views of the next `numel` elements, or of fewer at the end: one for each tensor that they lie in."""
        pieces = []
        start = self._at  # of the range, relative to the tensor at hand
        for flat in self._flats:
            low, high = max(start, 0), min(start + numel, flat.numel())
            if low < high:
                pieces.append(flat[low:high])
                numel, start = numel - (high - low), 0
            else:
                start -= flat.numel()
        self._at += sum(p.numel() for p in pieces)
        return pieces


def _tensors(value: Any) -> list[Tensor]:
    """A list of tensors, from a list or a single one."""
    return [value] if isinstance(value, Tensor) else list(value)


def _tag_folder(folder: Path) -> Path:
    """The folder of the newest tag, if `folder` names one in a file `latest`; else `folder` itself."""
    if (folder / "latest").is_file():
        tag = (folder / "latest").read_text().strip()
        if not (folder / tag).is_dir():
            raise CheckpointError(str(folder / "latest"), tag, "names a folder that is missing", "Name a tag's folder.")
        return folder / tag
    if not folder.is_dir():
        raise CheckpointError("SRC", str(folder), "is no folder", "Name a DeepSpeed checkpoint folder.")
    return folder


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """The files that match, by rank. Refuses tensor parallelism, whose ranks hold slices of one tensor."""
    found = {}
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match and int(match[2]) > 0:
            raise CheckpointError(
                str(path), None, "belongs to a model that is split between ranks other than by ZeRO",
                "Merge it with the program that trained it.",
            )  # fmt: skip
        if match:
            found[int(match[1] or 0)] = path
    return dict(sorted(found.items()))


def _check_ranks(paths: Mapping[int, Path], folder: Path) -> None:
    """Raise unless there is a file for each of the ranks among which the optimizer was divided."""
    count = load_pickle(next(iter(paths.values())))["optimizer_state_dict"]["partition_count"]
    world = max(_numbers(count))
    missing = sorted(set(range(world)) - set(paths))
    if missing:
        raise CheckpointError(
            str(folder), missing, f"lacks the files of these of its {world} ranks", "Copy the whole folder."
        )


def _numbers(value: Any) -> list[int]:
    """A list of numbers, from a list or a single one."""
    return [int(value)] if isinstance(value, int) else [int(v) for v in value]
