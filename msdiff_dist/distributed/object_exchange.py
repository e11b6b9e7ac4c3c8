"""Python objects between the ranks, through the key-value store that every job has.

Process groups could carry them too. But gloo opens a connection from each rank to each other one for every group, and
NCCL carries nothing that is not on a GPU. Here a rank talks to the store alone, and rank 0 reads what the others wrote
and passes on what it made of it: with W ranks that is W messages each way, where gathering everything on every rank
would be W squared.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")

_PIECE = 4 << 20  # bytes: the store refuses values of 8 MiB


class ObjectExchange:
    """One line of exchanges: every rank calls the same methods in the same order, one at a time.

    Args:
        store: the job's store. While a rank waits in one exchange, its connection serves nothing else, so exchanges
            that may be under way at once need connections of their own.
        name: the line's own, the same on every rank.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, name: str) -> None:
        self.rank, self.world_size = rank, world_size
        self._store: Any = store  # its stubs know no values of bytes
        self._name, self._count = name, 0

    def from_rank_0(self, own: T) -> T:
        """Rank 0's `own`."""
        key = self._next_key()
        if self.world_size == 1:
            return own
        if self.rank == 0:
            self._put(key, own)
            return own
        received: T = self._take(key, readers=self.world_size - 1)
        return received

    def combined(self, own: T, combine: Callable[[list[T]], R]) -> R:
        """What rank 0 made of every rank's `own`, in rank order, by `combine`."""
        key = self._next_key()
        if self.rank:
            self._put(f"{key}/{self.rank}", own)
            result = None
        else:
            others: list[T] = [self._take(f"{key}/{rank}", readers=1) for rank in range(1, self.world_size)]
            result = combine([own, *others])
        return self.from_rank_0(result)  # type: ignore[return-value]

    def _next_key(self) -> str:
        self._count += 1
        return f"objects/{self._name}/{self._count}"

    def _put(self, key: str, value: object) -> None:
        data = zlib.compress(pickle.dumps(value), level=1)  # an index of shards shrinks to a tenth
        first, *others = [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)]
        for i, piece in enumerate(others):
            self._store.set(f"{key}/piece/{i}", piece)
        # Readers wait for this key, so it is set last. It begins with the number of the other pieces.
        self._store.set(key, len(others).to_bytes(4, "big") + first)

    def _take(self, key: str, readers: int) -> T:  # type: ignore[type-var]
        """Wait for the value at `key`. The last of its readers removes it from the store."""
        head = self._store.get(key)
        count = int.from_bytes(head[:4], "big")
        pieces = [f"{key}/piece/{i}" for i in range(count)]
        data = b"".join([head[4:], *(self._store.get(piece) for piece in pieces)])
        if readers == 1 or self._store.add(f"{key}/read", 1) == readers:
            for done in (key, *pieces, *([f"{key}/read"] if readers > 1 else [])):
                self._store.delete_key(done)
        value: T = pickle.loads(zlib.decompress(data))
        return value


def own_exchange(name: str) -> ObjectExchange:
    """An exchange over a new connection to the job's store, for a thread beside the main one. Every rank makes it."""
    store: Any = dist.distributed_c10d._get_default_store()  # not all versions of torch give `clone` a type
    return ObjectExchange(store.clone(), dist.get_rank(), dist.get_world_size(), name)
