"""The key-value store of a job on one machine, in a process of its own that lives as long as the ranks.

Neither the supervisor nor rank 0 keeps it: if the supervisor is killed, the ranks save, which takes the store; and no
rank has to wait for the others before it ends.
"""

from __future__ import annotations

import signal
import socket
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess

from torch.distributed import TCPStore

from msdiff_dist.distributed.descriptors import raise_descriptor_limit

HOST = "127.0.0.1"


class StoreProcess:
    """A running store.

    Attributes:
        port: where it listens.
        lifeline: to be handed to every rank, which keeps it open; the store ends when all copies are closed.
    """

    def __init__(self, context: ForkServerContext, world_size: int) -> None:
        watched, self.lifeline = context.Pipe(duplex=False)
        # It listens before the process has begun: ranks that come early wait in its queue.
        with socket.create_server((HOST, 0), backlog=max(128, world_size)) as listener, watched:
            self.port: int = listener.getsockname()[1]
            self._process: BaseProcess = context.Process(target=_keep, args=(listener, watched, world_size))
            self._process.start()

    def release(self) -> None:
        """Let the store end when the ranks have ended."""
        self.lifeline.close()

    def join(self) -> None:
        """Wait for its end."""
        self._process.join()


def _keep(listener: socket.socket, lifeline: Connection, world_size: int) -> None:
    """Body of the process."""
    # Signals to the whole job are for the ranks, which save when they get them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    raise_descriptor_limit(world_size, on_gpus=False, keeps_store=True)
    store = TCPStore(
        HOST, listener.getsockname()[1], is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    try:
        lifeline.recv_bytes()  # nothing is sent: it ends when nobody holds the other end
    except EOFError:
        del store
