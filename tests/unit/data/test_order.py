"""The order of samples, compared with rounds that are played out."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from msdiff_dist.data.order import StreamOrder

shard_counts = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0)
lane_counts = st.integers(1, 64)
windows = st.integers(0, 40)
seeds = st.integers(0, 2**63)


def lane_samples(order: StreamOrder, lane: int, epoch: int) -> list[tuple[int, int]]:
    """The lane's (shard, number in shard) of one epoch, in the order in which the windows give them."""
    reading = [(s, i) for s in order.epoch(epoch).shards[lane] for i in range(order.counts[s])]
    given_order: list[tuple[int, int]] = []
    for window in order.windows(lane, epoch * order.num_samples):
        if window.epoch > epoch:
            break
        given_order += [reading[window.start + at] for at in window.order]
        assert window.skip == 0
        if len(given_order) == len(reading):
            break
    return given_order


def naive_turns(sizes: list[int]) -> list[tuple[int, int]]:
    """(lane, position) by playing the rounds out."""
    turns = []
    for position in range(max(sizes)):
        turns += [(lane, position) for lane, size in enumerate(sizes) if size > position]
    return turns


@given(shard_counts, lane_counts, windows, seeds, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_each_sample_once_in_the_order_of_played_out_rounds(counts, lanes, shuffle, seed, epoch):
    order = StreamOrder(counts, lanes, shuffle, seed)
    N = sum(counts)
    epoch_N, lane_N, position_N = order.locate(np.arange(epoch * N, (epoch + 1) * N))
    sizes = order.epoch(epoch).sizes_L.tolist()
    assert (epoch_N == epoch).all()
    assert list(zip(lane_N.tolist(), position_N.tolist(), strict=True)) == naive_turns(sizes)
    of_lane = {lane: lane_samples(order, lane, epoch) for lane in range(lanes) if sizes[lane]}
    visited = [of_lane[lane][j] for lane, j in zip(lane_N.tolist(), position_N.tolist(), strict=True)]
    assert sorted(visited) == [(s, i) for s, n in enumerate(counts) for i in range(n)]


@given(shard_counts, lane_counts, windows, seeds, st.data())
@settings(max_examples=60, deadline=None)
def test_starting_anywhere_gives_the_tail(counts, lanes, shuffle, seed, data):
    order = StreamOrder(counts, lanes, shuffle, seed)
    N = sum(counts)
    g = data.draw(st.integers(0, 3 * N))
    epoch_n, lane_n, position_n = order.locate(np.arange(g, g + 2 * N))
    for lane in np.unique(lane_n).tolist():
        expected = [(e, j) for e, j, at in zip(epoch_n, position_n, lane_n, strict=True) if at == lane]
        got: list[tuple[int, int]] = []
        opened = None
        for window in order.windows(lane, g):
            opened = window if opened is None else opened
            got += [(window.epoch, window.start + j) for j in range(window.skip, window.size)]
            if len(got) >= len(expected):
                break
        assert got[: len(expected)] == expected
        assert opened is not None
        assert opened.skip < opened.size  # nothing is read that was wholly given before


@given(shard_counts, lane_counts, windows, seeds, st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_numbers_can_be_located_far_into_a_run_and_in_any_grouping(counts, lanes, shuffle, seed, g):
    order = StreamOrder(counts, lanes, shuffle, seed)
    together = np.stack(order.locate(np.arange(g, g + 50)))
    one_by_one = np.concatenate([np.stack(order.locate(np.array([g + i]))) for i in range(50)], axis=1)
    assert (together == one_by_one).all()


def test_shards_are_dealt_evenly():
    order = StreamOrder([10] * 24, 8, 1, seed=0)
    assert [len(shards) for shards in order.epoch(0).shards] == [3] * 8


def test_epochs_and_seeds_differ_and_repeat():
    def keys(seed: int, epoch: int) -> list[tuple[int, int]]:
        return lane_samples(StreamOrder([50, 60, 70], 1, 64, seed), 0, epoch)

    assert keys(0, 0) == keys(0, 0)
    assert len({tuple(keys(*at)) for at in itertools.product((0, 1), (0, 1))}) == 4


def test_window_of_one_keeps_the_order_inside_the_shards():
    order = StreamOrder([5, 4], 1, 0, seed=3)
    samples = lane_samples(order, 0, 0)
    for shard in (0, 1):
        assert [i for s, i in samples if s == shard] == list(range(order.counts[shard]))


def test_windows_mix_no_further_than_their_size():
    order = StreamOrder([1000], 1, 100, seed=0)
    samples = [i for _, i in lane_samples(order, 0, 0)]
    assert all(i // 100 == at // 100 for at, i in enumerate(samples))
    assert samples != sorted(samples)
