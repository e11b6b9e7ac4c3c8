"""A trace of a model that never was, with round numbers, for tests of what is made of traces."""

from __future__ import annotations

import numpy as np

from msdiff_dist.models.trace import Kernels, ModelTrace, PartTrace


def part_trace(growth: list[tuple[int, int]], forward_events: int, outputs: int = 0, flops: int = 1000) -> PartTrace:
    """A part with one kernel: a convolution of `flops` operations and 10 bytes a sample.

    Args:
        growth: bytes at each event, (constant, per sample).
        outputs: bytes of outputs per sample.
    """
    return PartTrace(
        growth_E2=np.array(growth, dtype=np.int64).reshape(-1, 2),
        forward_events=forward_events,
        output_bytes_2=np.array([0, outputs]),
        kernels=Kernels(
            flops_N2=np.array([[0, flops]]),
            bytes_N2=np.array([[0, 10]]),
            layout_bytes_N2=np.array([[0, 4]]),
        ),
    )


def model_trace(stages: int) -> ModelTrace:
    """An encoder that keeps 300 bytes a sample, 100 of them features; stages that keep 500 and leave 100."""
    encoder = part_trace([(7, 400), (-7, -100), (0, 50), (0, -250)], forward_events=2, outputs=100)
    stage = part_trace([(0, 600), (0, -100), (0, 150), (0, -550)], forward_events=2)
    return ModelTrace(shared=encoder, stages=(stage,) * stages)
