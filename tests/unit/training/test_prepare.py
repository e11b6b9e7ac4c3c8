from __future__ import annotations

import torch

from msdiff_dist.training.prepare import Conditioning

LABEL, CONTEXT = torch.tensor([3, 1, 2]), torch.arange(12.0).reshape(3, 2, 2)
DROPPED = torch.tensor([False, True, False])


def test_dropped_conditions_become_their_nulls() -> None:
    null = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    label, context = Conditioning(null_label=10, null_context_TC=null).drop(LABEL, CONTEXT, DROPPED)
    assert label is not None
    assert context is not None
    assert label.tolist() == [3, 10, 2]
    assert torch.equal(context[1], null)
    assert torch.equal(context[[0, 2]], CONTEXT[[0, 2]])


def test_without_an_empty_caption_the_null_context_is_zero() -> None:
    label, context = Conditioning().drop(None, CONTEXT, DROPPED)
    assert label is None
    assert context is not None
    assert (context[1] == 0).all()
