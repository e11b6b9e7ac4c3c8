"""The networks in a file: trainers keep weights under names of their own, raw and averaged, beside much that is none.

A network is a set of named tensors. It is found in three places: in a mapping at any depth (`state_dict`, `model`,
`{"state_dict": {"ema": ...}}`), in a module that was saved whole, and behind a beginning that all its names share
(`module.`, `_orig_mod.`, `ema_model.`), which wrappers of modules add.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from msdiff_dist.convert.pickles.values import Array, Shell, items_of
from msdiff_dist.convert.recognition import begins_network, format_of
from msdiff_dist.errors import CheckpointError

# Attributes by which wrappers and trainers hold a network; names of its tensors begin with them.
_HOLDERS = (
    "module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "model", "net", "network", "unet", "denoiser",
    "ema", "ema_model", "model_ema", "ema_module", "online_model", "averaged_model", "swa_model",
)  # fmt: skip
_INSIDE = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"(?:^|[._\-])(?:ema|ema\d+|averaged?|avg|swa|shadow)(?=$|[._\-])", re.IGNORECASE)
_DEEPEST = 8  # containers inside each other that are searched
_MOST_MODULES = 1 << 16
_MODULE_STATE = ("_parameters", "_buffers", "_modules")
_PERSISTENT = "_reconstruct_persistent_obj"  # EDM's pickles: a module's attributes, beside its source code

Choice = Literal["auto", "ema", "raw"]
NamedTensors = Mapping[str, "Tensor | Array"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network that a file holds.

    Args:
        key: its place: keys of mappings, and beginnings of names, joined by dots. Empty: the file holds it alone.
        tensors: for each name inside the network, the name in its mapping.
        holder: place of that mapping.
    """

    key: str
    tensors: Mapping[str, str]
    holder: str

    @property
    def averaged(self) -> bool:
        """Whether its place calls it a moving average."""
        return _AVERAGED.search(self.key) is not None


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Which network of a file was taken.

    Args:
        key: its place.
        averaged: whether its place calls it a moving average.
        others: places of the file's other networks.
    """

    key: str
    averaged: bool
    others: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which network of a file to take.

    Args:
        weights: averaged or raw; auto takes the averaged one where there is any.
        key: its place, where the user gave it.
        format: its format; networks of others are left out where one is of it.
    """

    weights: Choice = "auto"
    key: str | None = None
    format: str | None = None


def networks_in(mappings: Mapping[str, Iterable[str]]) -> list[Network]:
    """The networks whose tensors' names are known beginnings, in the file's order.

    Args:
        mappings: the names of tensors in each of the file's mappings, by their places (`mappings_in`).

    Raises:
        CheckpointError: two tensors have one name when wrappers' parts of their names are removed.
    """
    found = []
    for holder, tensors in mappings.items():
        prefixes = list(dict.fromkeys(p for name in tensors if (p := _beginning(name)) is not None))
        for prefix in prefixes:
            longer = tuple(p for p in prefixes if len(p) > len(prefix))
            names: dict[str, str] = {}
            for name in tensors:
                if name.startswith(prefix) and not (longer and name.startswith(longer)):
                    inside = _INSIDE.sub("", name.removeprefix(prefix))
                    if inside in names:
                        raise CheckpointError(
                            name, None, f"is called {inside} without its wrappers, and so is {names[inside]}",
                            "Save the state dict of the module inside the wrappers.",
                        )  # fmt: skip
                    names[inside] = name
            key = ".".join(part for part in (holder, prefix.rstrip(".")) if part)
            found.append(Network(key=key, tensors=names, holder=holder))
    return found


def mappings_in(content: Any) -> dict[str, NamedTensors]:
    """Every mapping of tensors by name in a file's content, by its place; each once."""
    found: dict[str, NamedTensors] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]
    while waiting:
        place, value, depth = waiting.pop()
        items = _state_of_module(value) or items_of(value)
        if items is None or id(value) in seen or depth > _DEEPEST:
            continue
        seen.add(id(value))
        tensors = {k: v for k, v in items.items() if isinstance(k, str) and _is_tensor(v)}
        if tensors:
            found[place] = tensors
        # Names as long as these are no places, and joined ones could fill the memory.
        inner = [
            (k, v) for k, v in items.items() if isinstance(v, dict | Shell) and isinstance(k, str) and len(k) < 100
        ]
        waiting += [(f"{place}.{k}" if place else k, v, depth + 1) for k, v in reversed(inner)]
    return found


def chosen(networks: list[Network], wanted: Wanted, where: str) -> Network | None:
    """The network to convert; None where none is known.

    Args:
        where: the file, for errors.

    Raises:
        CheckpointError: several fit; there is none at the key; or raw weights are asked for and all are averaged.
    """
    if wanted.key is not None:
        at_key = [n for n in networks if n.key == wanted.key]
        if not at_key:
            known = ", ".join(n.key or "''" for n in networks) or "none that is known"
            raise CheckpointError("--key", wanted.key, f"{where} has no network there", f"It has: {known}.")
        return at_key[0]
    fitting = [n for n in networks if format_of(n.tensors) == wanted.format] or networks
    kinds = {n.averaged for n in fitting}
    if len(kinds) == 2:
        fitting = [n for n in fitting if n.averaged == (wanted.weights != "raw")]
    elif kinds == {True} and wanted.weights == "raw":
        raise CheckpointError(
            "--weights", "raw", f"{where} holds averaged weights only ({', '.join(n.key for n in fitting)})",
            "Remove --weights.",
        )  # fmt: skip
    if len(fitting) > 1:
        names = ", ".join(n.key or "''" for n in fitting)
        raise CheckpointError(
            "--key", None, f"{where} holds {len(fitting)} networks: {names}", "Name one of them with --key."
        )
    return fitting[0] if fitting else None


def taken(network: Network, networks: list[Network]) -> Taken | None:
    """Which of `networks` was taken; None where it is none of them."""
    if network not in networks:
        return None
    others = tuple(n.key for n in networks if n is not network)
    return Taken(key=network.key, averaged=network.averaged, others=others)


def note(taken: Taken | None, weights: Choice) -> list[str]:
    """A line for the report where the user has not said which of several networks to take."""
    if taken is None or not taken.others or weights != "auto":
        return []
    kind = "the averages" if taken.averaged else "the weights"
    return [f"weights: {kind} at {taken.key}; beside them are {', '.join(taken.others)} (--weights, --key)"]


def left_out(content: Any, network: Network, networks: list[Network], values: NamedTensors) -> dict[str, str]:
    """What else a file holds, by name, each with the reason why it is not converted.

    Args:
        content: of the file.
        values: the mapping that holds the network.
    """
    out: dict[str, str] = {}
    inside, place = content, ""
    while (rest := network.holder.removeprefix(place)) and isinstance(inside, dict):
        step = next((k for k in inside if isinstance(k, str) and f"{rest}.".startswith(f"{k}.")), None)
        if step is None:
            break
        out |= {f"{place}{name}": "state of the training, no weights" for name in inside if name != step}
        inside, place = inside[step], f"{place}{step}."
    if isinstance(inside, dict):
        out |= {str(name): "no tensor" for name, value in inside.items() if not _is_tensor(value)}
    out |= {n.key: f"not taken; {network.key} was" for n in networks if n.key in out}
    return out | beside(network, networks, values)


def beside(network: Network, networks: list[Network], names: Iterable[str]) -> dict[str, str]:
    """For each name in the network's mapping that is not of the network, the reason why it is not converted."""
    own = set(network.tensors.values())
    others = {name: n.key for n in networks if n.holder == network.holder for name in n.tensors.values()}
    return {
        name: f"of {others[name]}, which was not taken" if name in others else f"outside the network {network.key}"
        for name in names
        if name not in own
    }


def _beginning(name: str) -> str | None:
    """The part of a tensor's name before the name inside a known network; None if it is of no known network."""
    at = 0
    for _ in range(_DEEPEST):
        if begins_network(_INSIDE.sub("", name[at:])):
            return name[:at]
        holder, dot, _ = name[at:].partition(".")
        if not dot or holder not in _HOLDERS:
            return None
        at += len(holder) + 1
    return None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, Array) and value.data is not None)


def _state_of_module(value: Any) -> dict[str, Any] | None:
    """The state dict of a module that was saved whole, which is a shell here; None for any other value."""
    if _attributes(value) is None:
        return None
    state: dict[str, Any] = {}
    waiting: list[tuple[str, Any, int]] = [("", value, 0)]
    for _ in range(_MOST_MODULES):  # a module may be inside itself, or twice inside each of its modules
        if not waiting:
            break
        prefix, module, depth = waiting.pop()
        attributes = _attributes(module)
        if attributes is None or depth > 64:
            continue
        for kind in ("_parameters", "_buffers"):
            held = items_of(attributes.get(kind)) or {}
            state |= {f"{prefix}{k}": v for k, v in held.items() if isinstance(k, str) and _is_tensor(v)}
        inner = items_of(attributes.get("_modules")) or {}
        waiting += [
            (f"{prefix}{k}.", v, depth + 1)
            for k, v in reversed(list(inner.items()))
            if isinstance(k, str) and len(k) < 100
        ]
    return state or None


def _attributes(value: Any) -> Mapping[Any, Any] | None:
    """The attributes of a module; None for any other value."""
    if not isinstance(value, Shell):
        return None
    fields: Mapping[Any, Any] = value.fields
    if value.name.endswith(_PERSISTENT) and value.args:
        fields = items_of((items_of(value.args[0]) or {}).get("state")) or {}
    return fields if all(isinstance(fields.get(part), dict) for part in _MODULE_STATE) else None
