"""The queue between the two processes of a conversion.

`multiprocessing.Queue` needs named semaphores, which stay in ``/dev/shm`` when all processes of a
conversion are killed at once, as a batch system does. A pipe needs none: the kernel closes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import queue
import threading
from multiprocessing.context import SpawnContext

_PIPE = 1 << 20  # bytes that may lie in the pipe; linux Documentation/admin-guide/sysctl/fs.rst


class MessageQueue:
    """Bytes for one reader in one process from one writer in another.

    Whoever makes it keeps both ends open: the end of one process does not wake the other up.

    Args:
        context: that starts the two processes, which get the queue as an argument.
        size: messages that may wait in the process that writes; as many as 1 MiB holds wait in the
            pipe besides.
    """

    def __init__(self, context: SpawnContext, size: int) -> None:
        self._size = size
        self._reader, self._writer = context.Pipe(duplex=False)
        with contextlib.suppress(OSError, AttributeError):  # only a matter of speed
            fcntl.fcntl(self._writer.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)

    def get(self) -> bytes:
        """Wait for the next message."""
        return self._reader.recv_bytes()

    def put(self, message: bytes) -> None:
        """Hand a message over; waits while ``size`` of them are on their way."""
        if not hasattr(self, "_waiting"):
            self._waiting: queue.Queue[bytes | None] = queue.Queue(self._size)
            # A daemon: whoever fails has no reason to wait until everything is sent.
            self._sender = threading.Thread(target=self._send, name="sender", daemon=True)
            self._sender.start()
        self._waiting.put(message)

    def finish(self) -> None:
        """Wait until all messages are in the pipe."""
        if hasattr(self, "_waiting"):
            self._waiting.put(None)
            self._sender.join()

    def close(self) -> None:
        """Close both ends in this process."""
        self._reader.close()
        self._writer.close()

    def _send(self) -> None:
        while (message := self._waiting.get()) is not None:
            self._writer.send_bytes(message)
