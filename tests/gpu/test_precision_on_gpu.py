"""Which precision a GPU gets."""

from __future__ import annotations

import pytest
import torch

from msdiff_dist.distributed.precision import agree_on_precision, bf16_support, emulation_factor, expected_precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_bf16_where_the_gpu_computes_it_natively() -> None:
    device = torch.device("cuda", 0)
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert bf16_support(device).native == native
    chosen = agree_on_precision("auto", device, None)
    assert chosen.precision == ("bf16" if native else "fp32")
    assert chosen.why.startswith("this GPU computes bf16")
    assert (agree_on_precision("bf16", device, None).warning is None) == native
    assert emulation_factor(device) > 0
    assert expected_precision("auto", on_gpus=True) == "bf16"
