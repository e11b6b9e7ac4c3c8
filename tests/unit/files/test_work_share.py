"""Commands split into parts."""

from __future__ import annotations

from msdiff_dist.launch.launcher import parts_of


def test_numbers_are_filled_in_and_other_braces_left_alone() -> None:
    command = ["encode", "data.shards=/raw/{part:03d}.tar", "{part}/{parts}", "{000..009}.tar"]
    assert parts_of(command, 2) == [
        ["encode", "data.shards=/raw/000.tar", "0/2", "{000..009}.tar"],
        ["encode", "data.shards=/raw/001.tar", "1/2", "{000..009}.tar"],
    ]
