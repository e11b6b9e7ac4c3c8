"""Generic resources as clusters write them."""

from __future__ import annotations

import pytest

from msdiff_dist.launch.gres import gpus, of_one_rank, parse_gres


@pytest.mark.parametrize(
    ("text", "number", "one"),
    [
        ("gpu:8", 8, "gpu:1"),
        ("gpu", 1, "gpu:1"),
        ("gpu:a100", 1, "gpu:a100:1"),
        ("gpu:a100:4", 4, "gpu:a100:1"),
        ("gpu:a100:4(S:0-1)", 4, "gpu:a100:1"),
        ("gpu:2(S:0,1),lustre:1", 2, "gpu:1,lustre:1"),
        ("lustre:1,gpu:nvidia_h100_80gb_hbm3:8(S:0-1)", 8, "gpu:nvidia_h100_80gb_hbm3:1,lustre:1"),
        ("gpu:a100:4,gpu:v100:2", 6, "gpu:a100:1"),
        ("gpu:1g.10gb:7(IDX:0-6)", 7, "gpu:1g.10gb:1"),
        ("gres/gpu:4", 4, "gpu:1"),
    ],
)
def test_gpus_of_a_node_and_of_one_rank(text: str, number: int, one: str) -> None:
    assert gpus(parse_gres(text)) == number
    assert of_one_rank(parse_gres(text)) == one


def test_nodes_without_resources() -> None:
    assert parse_gres("(null)") == parse_gres("") == ()


@pytest.mark.parametrize("text", ["gpu::", "gpu:a100:four:4", ":4", "gpu:4:a100"])
def test_what_is_no_resource(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_gres(text)
