"""How many file descriptors a rank needs, and the limit of the operating system on them.

Past the limit gloo waits for ever for the connections that it could not open: a hang without an error. So the limit is
raised, or the run refused, before there are groups.
"""

from __future__ import annotations

import resource

from msdiff_dist.errors import UserError

# Logs, shards, pipes to loader workers, libraries: 60 were counted in a run. The drivers of a GPU open more.
_OWN, _OWN_ON_GPU = 96, 192
# Of gloo, for each group: one to every other rank, and four that are its own.
_MESHES, _OF_MESH = 3, 3
# To the job's store from every rank, where a rank keeps it: of process groups, saves and heartbeats; one more to spare.
_TO_STORE = 4
# NCCL connects only ranks that exchange something, of which routing takes the most: two ways to every rank of another
# node, each with one socket or more. Over InfiniBand it needs a few only, so nothing is refused for want of these.
_OF_NCCL = 8


def descriptors_needed(world_size: int, *, on_gpus: bool, keeps_store: bool = True) -> int:
    """File descriptors that one of `world_size` ranks opens at most; under NCCL without those of its connections.

    Args:
        keeps_store: whether it is the rank that keeps the job's store: rank 0, unless the launcher keeps it.
    """
    store = _TO_STORE * world_size if keeps_store else _TO_STORE
    if on_gpus:
        return _OWN_ON_GPU + store
    # The default group, that of routing, and those of the held stages, which together are no larger than another one.
    return _OWN + store + _MESHES * (world_size + _OF_MESH)


def raise_descriptor_limit(world_size: int, *, on_gpus: bool, keeps_store: bool) -> None:
    """Raise this process's limit on open files to what it needs as one of `world_size` ranks.

    Raises:
        UserError: the system does not allow as many.
    """
    needed = descriptors_needed(world_size, on_gpus=on_gpus, keeps_store=keeps_store)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not _allows(hard, needed):
        raise UserError(
            "ulimit -Hn",
            hard,
            f"a rank of {world_size} opens up to {needed} files and connections",
            "Raise the hard limit on every node (LimitNOFILE of slurmd or of the container), or use fewer ranks.",
        )
    wanted = needed + (_OF_NCCL * world_size if on_gpus else 0)
    if not _allows(soft, wanted):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if _allows(hard, wanted) else hard, hard))


def _allows(limit: int, count: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= count
