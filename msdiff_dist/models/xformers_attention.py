"""Attention by xformers: the call, and whether this installation has an operator for what a model computes.

xformers brings an extension that is built for one version of torch and of CUDA. Beside another it can be imported, but
every operator for GPUs is refused, at the first call. So what a recipe asks for is checked before training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from msdiff_dist.errors import ConfigError

FIELD = "model.attention_backend"


def xformers_attention(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of each head, [B, H, T, D].

    Raises:
        ConfigError: the installed xformers has no operator for these inputs.
    """
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q_BHTD, k_BHSD, v_BHSD))  # xformers takes [B, T, H, D]
    try:
        from xformers.ops import memory_efficient_attention

        out: Tensor = memory_efficient_attention(q, k, v).transpose(1, 2)
        return out
    except (ImportError, NotImplementedError) as e:
        raise _refusal(_no_operator(q_BHTD.shape[-1], q_BHTD.dtype, q_BHTD.device, e)) from e


def check_installation(device_type: str) -> None:
    """Check that xformers can compute on devices of this type at all. Needs no such device.

    Raises:
        ConfigError: they are not GPUs, or its CUDA extension does not load; the error says for which versions it was
            built.
    """
    if device_type != "cuda":
        problem = f"xformers computes on GPUs only, and this run computes on {device_type}"
        raise ConfigError(FIELD, "xformers", problem, "Use auto or sdpa.")
    if reason := extension_problem():
        raise _refusal(f"the installed xformers cannot be used: {reason}")


def check_operators(head_sizes: Iterable[int], dtype: torch.dtype, device: torch.device) -> None:
    """Check that xformers has operators for attention forward and backward with heads of these sizes on `device`.

    Raises:
        ConfigError: it has none for one of them; the error quotes xformers' reasons.
    """
    check_installation(device.type)
    for head_size in head_sizes:
        try:
            _choose_operators(head_size, dtype, device)
        except NotImplementedError as e:
            raise _refusal(_no_operator(head_size, dtype, device, e)) from e


def extension_problem() -> str | None:
    """Why no operator of the installed xformers can compute on any GPU, as a clause; None if its extension loads."""
    try:
        from xformers import _cpp_lib
    except Exception as e:  # whatever a broken installation raises when it is imported
        return f"it cannot be imported ({type(e).__name__}: {e})"
    failure = _cpp_lib._cpp_library_load_exception
    if failure is None:
        return None if _cpp_lib._built_with_cuda else "it was built without CUDA"
    built = getattr(failure, "build_info", None)
    if built is None:
        return "it was installed without its CUDA extension"
    cause: BaseException = failure
    while cause.__cause__:  # the innermost one names the library that is missing
        cause = cause.__cause__
    return (
        f"its CUDA extension does not load beside torch {torch.__version__} ({cause}); it was built for torch "
        f"{built.torch_version}"
    )


def _choose_operators(head_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Have xformers choose the operators of a forward and a backward pass.

    Raises:
        NotImplementedError: as the passes themselves would raise it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # here: it takes a second to import
    from xformers.ops.fmha import Inputs, dispatch

    with FakeTensorMode():  # the choice looks at shapes, strides, types and the device, and not at numbers
        q, k, v = (torch.empty(1, 16, 1, head_size, dtype=dtype, device=device) for _ in range(3))
        inputs = Inputs(query=q, key=k, value=v)
        dispatch._dispatch_fw(inputs, True)
        dispatch._dispatch_bw(inputs, None)


def _no_operator(head_size: int, dtype: torch.dtype, device: torch.device, refusal: Exception) -> str:
    # xformers' message lists, over many lines, why each of its operators is not the right one.
    reasons = re.findall(r"`(\S+)` is not supported because:\n +(.+)", str(refusal))
    quoted = "; ".join(f"{operator}: {first}" for operator, first in reasons) or refusal
    kind = f"{dtype} on {device.type} with {head_size} channels per head"
    return f"the installed xformers has no operator for {kind} ({quoted})"


def _refusal(problem: str) -> ConfigError:
    remedy = "Use auto or sdpa, or install torch and xformers that belong together: `msdiff doctor` names them."
    return ConfigError(FIELD, "xformers", problem, remedy)
