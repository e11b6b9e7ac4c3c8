"""How far two computations are apart, and float32 that is not rounded to TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|, both norms over all elements."""
    return float((found - exact).norm() / exact.norm())


def cosine(found: Tensor, exact: Tensor) -> float:
    """Cosine of the angle between two tensors, taken as vectors."""
    return float((found * exact).sum() / (found.norm() * exact.norm()))


@contextmanager
def exact_fp32(exact: bool = True) -> Iterator[None]:
    """Inside, products of float32 matrices and convolutions on GPUs keep all 24 bits, or as TF32 11 bits."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    cuda.allow_tf32 = cudnn.allow_tf32 = not exact
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before
