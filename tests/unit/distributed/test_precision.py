from __future__ import annotations

import pytest
import torch

from msdiff_dist.distributed import precision
from msdiff_dist.distributed.precision import choose_precision, emulation_factor, expected_precision, native_bf16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "native"),
    [({"avx2", "fma"}, False), ({"avx512f", "avx512vl"}, False), ({"avx512_bf16"}, True), ({"asimd", "bf16"}, True)],
)
def test_auto_is_bf16_where_the_cpu_has_it(flags: set[str], native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_flags", lambda: flags)
    choice = choose_precision("auto", CPU, None)
    assert (choice.precision, choice.warning) == ("bf16" if native else "fp32", None)
    assert choice.why == f"this CPU computes bf16 {'natively' if native else 'by emulation'}"
    assert expected_precision("auto", on_gpus=False) == choice.precision
    assert expected_precision("auto", on_gpus=True) == "bf16"


def test_a_run_keeps_what_it_has_and_is_warned_of_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_flags", lambda: {"avx2"})
    kept = choose_precision("auto", CPU, "bf16")
    assert (kept.precision, kept.why) == ("bf16", "as the run began")
    assert kept.warning is not None
    assert "times as long as in fp32" in kept.warning
    assert choose_precision("auto", CPU, "fp32").warning is None
    assert choose_precision("fp32", CPU, "bf16").precision == "fp32"
    assert choose_precision("bf16", CPU, None).warning is not None


def test_this_machine() -> None:
    native, sentence = native_bf16(CPU)
    assert ("natively" in sentence) == native
    assert emulation_factor() > 0
