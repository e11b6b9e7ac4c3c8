"""Fingerprint of a frozen network by its settings and weights.

Shards of latents or embeddings record it, so that a model is not used with data of another autoencoder or text encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that depend on all settings and every bit of the weights, and on nothing else."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        # numpy has no bfloat16: hash the raw bytes.
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
