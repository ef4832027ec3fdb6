"""COPY's bytes in large pieces: how the driver is woken for many rows at once, and how its pieces become blocks of a frame."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from athena_backup.operation import LOOK_SECONDS
from athena_backup.pipeline import FRAME_BYTES

_PIECE_BYTES = 768 << 10
"""Of COPY's bytes that the kernel gathers before it wakes a reading session: woken for each 150 KB, as many as lie there by
then, it spent 3 % of a backup's time in going round its loop.
"""
_PATIENCE_SECONDS = 0.003
"""After so long without a piece it takes what there is: a COPY ends, or a source is slow."""
_MISSES_LIMIT = 20
"""A source that has no large piece for so many times as long is slow: to look on would cost more than its small pieces."""
_REST_SECONDS = 5
"""So long a slow source is left alone."""


@contextlib.contextmanager
def large_pieces(transport: Any, gathered: "Gathered") -> Iterator[None]:
    """Have the driver get COPY's bytes in larger pieces: the socket is ready from `_PIECE_BYTES` on (socket(7), SO_RCVLOWAT).

    Whatever is not read by plain TCP is left as it is.
    """
    sock = transport.get_extra_info("socket")
    if not hasattr(transport, "max_size") or sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        yield
        return

    woken_from = 1

    def wake_from(size_bytes: int) -> None:
        nonlocal woken_from
        if size_bytes != woken_from:
            woken_from = size_bytes
            # OSError: of a connection that is broken by now, which its reader says better.
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)

    async def look() -> None:
        misses = 0
        while True:
            largest_bytes = gathered.forget_largest()
            if largest_bytes >= _PIECE_BYTES // 2:
                misses = 0
            elif not gathered.is_full:
                misses += 1
            if misses >= _MISSES_LIMIT:
                # It may be faster later: a table with many dead rows, a checkpoint.
                wake_from(1)
                await asyncio.sleep(_REST_SECONDS)
                misses = _MISSES_LIMIT // 2
            wake_from(_PIECE_BYTES if largest_bytes else 1)
            await asyncio.sleep(_PATIENCE_SECONDS)

    before_bytes, transport.max_size = transport.max_size, _PIECE_BYTES
    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        wake_from(1)
        transport.max_size = before_bytes


class Gathered:
    """What the driver has handed out, until it is a frame's worth: to enter its loop for each piece would cost more than COPY."""

    def __init__(self) -> None:
        self._largest_bytes = 0
        self._pieces: list[bytes | bytearray] = []
        self._size_bytes = 0
        self._is_full = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    async def put(self, piece: bytes | bytearray) -> None:
        """Take a piece, once there is room for it: until then the driver does not read on. A large one is emptied by `take`."""
        await self._has_room.wait()
        self._largest_bytes = max(self._largest_bytes, len(piece))
        self._pieces.append(piece)
        self._size_bytes += len(piece)
        if self._size_bytes >= FRAME_BYTES:
            self._has_room.clear()
            self._is_full.set()

    @property
    def is_full(self) -> bool:
        """Whether the driver is not to read on."""
        return self._is_full.is_set()

    def forget_largest(self) -> int:
        """The size of the largest piece since the last call, in bytes; 0: none has come."""
        largest_bytes, self._largest_bytes = self._largest_bytes, 0
        return largest_bytes

    async def filled(self, copying: "asyncio.Task[str]") -> bool:
        """Wait for a frame's worth, or the end, or until it is time to look around; returns whether it was the end."""
        full = asyncio.create_task(self._is_full.wait())
        await asyncio.wait({full, copying}, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        full.cancel()
        return copying.done()

    def take(self) -> Iterator[bytes]:
        """Everything that has come, in blocks of about a frame."""
        # Behind what is a frame's worth nothing is taken: only the last piece can be a large one.
        large = self._pieces.pop() if self._pieces and len(self._pieces[-1]) > FRAME_BYTES else b""
        block = b"".join(self._pieces)
        self._pieces.clear()
        self._size_bytes = 0
        self._is_full.clear()
        self._has_room.set()
        if block:
            yield block
        yield from _emptied(large)


def _emptied(piece: bytes | bytearray) -> Iterator[bytes]:
    """A piece in blocks of a frame; behind the last it is empty.

    A row of hundreds of megabytes is not to be held several times, and the driver refers to its piece until the next has come.
    """
    try:
        for start in range(0, len(piece), FRAME_BYTES):
            # No view is left while the block is used: what one looks at can't be cleared.
            with memoryview(piece) as whole, whole[start : start + FRAME_BYTES] as part:
                block = bytes(part)
            yield block
    finally:
        if isinstance(piece, bytearray):
            piece.clear()
