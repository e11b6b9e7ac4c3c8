"""A GPU simulated on the CPU, which counts the times that the host would wait for it.

Tensors have a place, the host or the device, by their storage. All of them lie in the CPU's memory and all operations
are done there, at once; but `device` says the place, results of operations on the device are on the device, and what
would wait on CUDA is counted with the line that did it:

- reading a value (`item`, `tolist`, `bool`, `float`), copying to the host, `synchronize` of the device or of an event;
- copying to the device other than from page-locked memory with `non_blocking=True`, which includes `torch.tensor(...,
  device=...)` and indexing by lists, arrays or tensors of the host;
- results whose size depends on values: `nonzero`, `unique`, indexing by a mask.

Operations that mix tensors of both places raise, as on CUDA, except for numbers of the host (tensors without
dimensions). An event has happened once the host has waited after it was recorded.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
_READS = {"_local_scalar_dense", "is_nonzero", "equal"}
_SIZED_BY_VALUES = {"nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique2", "_unique"}
_MOVES = {"copy_", "_to_copy", "index", "index_put", "index_put_", "set_", "_foreach_copy_"}
_HERE = Path(__file__).name
_LIBRARIES = ("site-packages/torch/", "contextlib.py", "typing_extensions.py")


class _Places:
    """Which storages are on the device, and which of the host's are page-locked."""

    def __init__(self) -> None:
        # A weak reference keeps the address of a storage from being used again.
        self.device: dict[int, StorageWeakRef] = {}
        self.pinned: dict[int, StorageWeakRef] = {}

    @staticmethod
    def put(tensor: Tensor, into: dict[int, StorageWeakRef]) -> Tensor:
        reference = StorageWeakRef(tensor.untyped_storage())
        into.setdefault(reference.cdata, reference)
        return tensor

    def on_device(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage()._cdata in self.device

    def is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self.pinned


class SimulatedGpu:
    """The device.

    Attributes:
        waits: where the host has waited so far, one entry each.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.places = _Places()

    def wait(self, why: str) -> None:
        """The host waits for the device."""
        frames = [f for f in traceback.extract_stack() if not f.filename.endswith(_HERE)]
        own = [f for f in frames if not any(library in f.filename for library in _LIBRARIES)]
        frame = own[-1]
        self.waits.append(f"{why} at {frame.filename}:{frame.lineno}: {frame.line}")

    @contextmanager
    def active(self) -> Iterator[None]:
        """Until the end of the block, `torch.device("cuda")` is this device, for DeepSpeed too."""
        accelerator = _Accelerator()
        accelerator.synchronize = lambda device_index=None: self.wait("synchronize")  # type: ignore[method-assign]
        set_accelerator(accelerator)

        def set_device(device: object) -> None:
            # What CUDA wants of every thread: here it makes the device known to the thread.
            _Operations(self).__enter__()
            _Functions(self).__enter__()

        def event(**options: object) -> _Event:
            return _Event(self)

        def synchronize(device: object = None) -> None:
            self.wait("synchronize")

        changes = {"set_device": set_device, "Event": event, "synchronize": synchronize}
        with patch.multiple(torch.cuda, **changes), _Operations(self), _Functions(self):
            yield


class _Accelerator(CPU_Accelerator):  # type: ignore[misc]
    def device_name(self, device_index: int | None = None) -> str:
        return "cuda" if device_index is None else f"cuda:{device_index}"

    def current_device_name(self) -> str:
        return "cuda:0"

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cuda"


class _Event:
    """Stands for `torch.cuda.Event`."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        self._gpu = gpu
        self._waits_before: int | None = None

    def record(self) -> None:
        self._waits_before = len(self._gpu.waits)

    def query(self) -> bool:
        return self._waits_before is not None and len(self._gpu.waits) > self._waits_before

    def synchronize(self) -> None:
        self._gpu.wait("synchronize of an event")

    def elapsed_time(self, end: _Event) -> float:
        assert all(event.query() for event in (self, end)), "the time of something that has not happened"
        return 1.0


class _Operations(TorchDispatchMode):
    """Results of operations on the device are on the device. Sees all operations, those of autograd included."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self._gpu, self._places = gpu, gpu.places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if not any(map(self._places.on_device, tensors)):
            return func(*args, **kwargs)
        self._check(func, name, args, tensors)
        out = func(*args, **kwargs)
        if name not in ("_local_scalar_dense", "is_nonzero", "equal"):
            tree_map(lambda x: self._places.put(x, self._places.device) if isinstance(x, Tensor) else x, out)
        return out

    def _check(self, func: Any, name: str, args: Any, tensors: list[Tensor]) -> None:
        if name in _READS:
            self._gpu.wait(name)
        if name in _SIZED_BY_VALUES or (name == "repeat_interleave" and func._overloadname == "Tensor"):
            self._gpu.wait(f"a size that depends on values ({name})")
        if name.startswith(("index", "_index")) and name.rstrip("_") in ("index", "index_put", "_index_put_impl"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self._gpu.wait("indexing by a mask")
                elif index is not None and not self._places.on_device(index):
                    self._gpu.wait("indexing by numbers of the host")
        if name == "copy_":
            target, source, *rest = args
            if self._places.on_device(target) != self._places.on_device(source):
                pinned = self._places.is_pinned(target) or self._places.is_pinned(source)
                if not (rest and rest[0] and pinned):
                    self._gpu.wait("copy between host and device")
        if name not in _MOVES and not func._schema.name.startswith("c10d"):
            strange = [t for t in tensors if t.dim() and not self._places.on_device(t)]
            assert not strange, f"{func} mixes tensors of host and device"


class _Functions(TorchFunctionMode):
    """What callers ask of devices. Sees all calls from Python."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self._gpu, self._places = gpu, gpu.places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, own = getattr(func, "__name__", ""), args[0] if args else None
        on_device = self._places.on_device
        if name == "__get__" and func in _GETTERS:
            return _GETTERS[func] if on_device(own) else func(*args, **kwargs)
        if isinstance(own, Tensor) and name in ("to", "cpu", "cuda", "pin_memory", "is_pinned", "tolist", "numpy"):
            return self._tensor_method(name, own, args[1:], kwargs)
        if func is torch.nn.functional.one_hot and on_device(own):
            # It looks at the labels on a CPU only.
            with _disable_current_modes():
                out = func(*args, **kwargs)
            return self._places.put(out, self._places.device)
        if func is Tensor.backward:
            # Functions called inside this one are not seen, and hooks of the backward pass are to be.
            gradient, keep = kwargs.get("gradient"), kwargs.get("retain_graph") or False
            with self:
                gradient = torch.ones_like(own) if gradient is None else gradient
                return _engine_run_backward(
                    (own,), (gradient,), keep, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if "device" not in kwargs and not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        pinned = kwargs.pop("pin_memory", False)
        device = kwargs.pop("device", None)
        is_gpu = device is not None and torch.device(device).type == "cuda"
        source = on_device(own)
        out = func(*args, **kwargs, device="cpu" if is_gpu else device)
        if is_gpu and name in ("tensor", "as_tensor", "asarray") and not source:
            self._gpu.wait("copy of numbers of the host")
        if is_gpu and isinstance(out, Tensor):
            self._places.put(out, self._places.device)
        if pinned:
            self._places.put(out, self._places.pinned)
        return out

    def _tensor_method(self, name: str, own: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        places = self._places
        if name == "is_pinned":
            return places.is_pinned(own)
        if name == "pin_memory":
            assert not places.on_device(own)
            return places.put(own.clone(), places.pinned)
        if name in ("tolist", "numpy"):
            if places.on_device(own):
                assert name == "tolist", "no array of numpy can be on a device"
                self._gpu.wait("tolist")
            return getattr(own, name)(*args, **kwargs)
        if name in ("cpu", "cuda"):
            target, changed, non_blocking = torch.device(name), own, kwargs.get("non_blocking", False)
        else:
            target, dtype, non_blocking, copy = self._arguments(*args, **kwargs)
            changed = own.to(
                dtype or own.dtype, copy=copy, memory_format=kwargs.get("memory_format", torch.preserve_format)
            )
        if target is None or (target.type == "cuda") == places.on_device(own):
            return changed if target is None or target.type in ("cpu", "cuda") else changed.to(target)
        if target.type == "cuda":
            if not (non_blocking and places.is_pinned(own)):
                self._gpu.wait("copy from the host")
            return places.put(changed.clone(), places.device)
        self._gpu.wait("copy to the host")
        with _disable_current_modes():
            return changed.clone()

    def _arguments(
        self,
        *args: Any,
        device: Any = None,
        dtype: Any = None,
        non_blocking: bool = False,
        copy: bool = False,
        **_: Any,
    ) -> tuple[torch.device | None, torch.dtype | None, bool, bool]:
        """(device, dtype, non_blocking, copy) of a call of `Tensor.to`."""
        rest = [*args]
        if rest and isinstance(rest[0], Tensor):
            other = rest.pop(0)
            device, dtype = other.device, other.dtype
            device = GPU if self._places.on_device(other) else device
        elif rest and not isinstance(rest[0], torch.dtype):
            device = rest.pop(0)
        if rest and not isinstance(rest[0], bool):
            dtype = rest.pop(0)
        non_blocking, copy = [*rest, *[non_blocking, copy][len(rest) :]]
        return None if device is None else torch.device(device), dtype, non_blocking, copy


_GETTERS = {Tensor.device.__get__: GPU, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}
