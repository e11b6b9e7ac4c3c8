"""Orders of collectives that complete, and orders that wait for each other."""

from __future__ import annotations

import random

import pytest

from msdiff_dist.distributed.collective_order import RankCalls, find_disagreement
from msdiff_dist.distributed.collective_trace import Call

MEMBERS = {"a": (0, 1, 2), "b": (0, 1), "c": (1, 2), "d": (2, 0)}


def ranks(*orders: str) -> list[RankCalls]:
    """One rank for each order, a string of groups' names; a capital letter is a call of another kind."""
    return [
        RankCalls(
            rank=rank,
            groups={group: f"group {group}" for group, members in MEMBERS.items() if rank in members},
            calls=[
                Call(
                    group=letter.lower(),
                    kind="all_gather" if letter.isupper() else "all_reduce",
                    what="4 float32",
                    bytes=16,
                    label=None,
                    phase="",
                )
                for letter in order
            ],
        )
        for rank, order in enumerate(orders)
    ]


def completes(orders: list[str], rng: random.Random) -> bool:
    """Whether blocking collectives complete if ranks arrive in a random order: an independent simulation."""
    left = [list(order) for order in orders]
    while any(left):
        able = [
            letter
            for letter in {order[0] for order in left if order}
            if all(left[rank] and left[rank][0] == letter for rank in MEMBERS[letter.lower()])
        ]
        if not able:
            return False
        letter = rng.choice(sorted(able))
        for rank in MEMBERS[letter.lower()]:
            left[rank].pop(0)
    return True


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        (("bda", "bca", "cda"), None),
        (("aba", "aba", "aa"), None),
        (("ab", "aB", "a"), "group b, call 1: rank 0 issues all_reduce of 4 float32, rank 1 issues all_gather of 4"),
        (("abb", "ab", "a"), "group b, call 2: rank 0 issues all_reduce of 4 float32, rank 1 issues nothing"),
        (("ab", "a", "a"), "group b, call 1: rank 0 issues all_reduce of 4 float32, rank 1 issues nothing"),
        (
            ("ab", "ba", "a"),
            "rank 1 issues call 1 of group b (all_reduce of 4 float32) before call 1 of group a (all_reduce of 4 "
            "float32); rank 0 issues call 1 of group a (all_reduce of 4 float32) before call 1 of group b",
        ),
        # No two ranks issue two groups in different orders, and all three wait for each other.
        (("bd", "cb", "dc"), "rank 2 issues call 1 of group d"),
    ],
)
def test_examples(orders: tuple[str, ...], expected: str | None) -> None:
    found = find_disagreement(ranks(*orders))
    assert found is None if expected is None else found is not None and expected in found


def test_agrees_with_a_simulation() -> None:
    rng, outcomes = random.Random(0), []
    for _ in range(300):
        calls = [rng.choice("abcd") for _ in range(rng.randint(1, 6))]
        orders = ["".join(c for c in calls if rank in MEMBERS[c]) for rank in range(3)]
        for _ in range(rng.randint(0, 2)):  # one rank exchanges two neighbouring calls
            rank = rng.randrange(3)
            if len(orders[rank]) > 1:
                at = rng.randrange(len(orders[rank]) - 1)
                order = orders[rank]
                orders[rank] = order[:at] + order[at + 1] + order[at] + order[at + 2 :]
        outcomes.append(completes(orders, rng))
        assert (find_disagreement(ranks(*orders)) is None) == outcomes[-1], orders
    assert 30 < sum(outcomes) < 270, "both outcomes are met"
