"""A step's calls cannot come in another order than the one in which they are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from msdiff_dist.testing import run_distributed
from tests.distributed.tiny_run import ADAM, open_run, recipe_of

pytestmark = pytest.mark.distributed


def wrong_orders(rank: int, path: Path) -> tuple[float, float]:
    """Tries each, then takes the step as it is right; its gradient norm, and that of the plain step after it."""
    run = open_run(rank, 1, recipe_of(ADAM, train__gradient_accumulation_steps=2), path)
    first, second = run.feed.next_batch()
    batches = [(micro, run.prepare(micro)) for micro in (first, second)]

    def forward_backward(number: int) -> None:
        micro, batch = batches[number]
        run.engines.forward_backward(
            batch.inputs, micro.rows, lambda k, output, rows: (output.float() - 1).square().sum() / 24
        )

    forward_backward(0)
    with pytest.raises(AssertionError, match="micro batches are missing"):
        run.engines.agreement()
    forward_backward(1)
    with pytest.raises(AssertionError, match="step before the next micro batch"):
        forward_backward(0)
    gradients = run.engines.reduce(run.engines.agreement())
    gradients.step(1e-3)
    with pytest.raises(AssertionError, match="micro batches are missing"):
        run.engines.agreement()
    after = run.step(1e-3).grad_norm
    run.feed.close()
    return float(gradients.norm), after


def test_no_optimizer_steps_before_the_norm_is_known(tmp_path: Path) -> None:
    ((norm, after),) = run_distributed(wrong_orders, 1, tmp_path)
    assert norm > 0
    assert after > 0
