"""A new file's bytes to the disk past the page cache (open(2), O_DIRECT), where the file system can.

Copies of what nobody reads soon would take the cache's memory from the databases of the same machine, and making them costs a
tenth of a whole backup's processor time (tried). Where the file system refuses, the file is written like any other.
"""

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterable

BLOCK_BYTES = 4 << 20
"""What one write hands to the disk; what is left of a file at its end goes through the page cache."""


def write_direct(file: int, chunks: Iterable[bytes]) -> None:
    """Write all ``chunks`` into the open, empty ``file``, one block while the next is filled; to sync and close it is the caller's.

    Raises `OSError` where the disk, or a lack of memory, has one, and whatever ``chunks`` raises; nothing is being written then.
    """
    block, other = _memory(), _memory()
    filled = 0
    writing: _Writing | None = None
    try:
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                taken = min(len(rest), BLOCK_BYTES - filled)
                block[filled : filled + taken] = rest[:taken]
                rest, filled = rest[taken:], filled + taken
                if filled == BLOCK_BYTES:
                    if writing is not None:
                        writing.finish()
                    writing = _Writing(file, block)
                    block, other, filled = other, block, 0
    finally:
        if writing is not None:
            writing.wait()
    if writing is not None:
        writing.finish()
    _write_all(file, block[:filled])


class _Writing:
    """A block on its way to the disk, in a thread that keeps no process from ending when the disk hangs; an executor's would."""

    def __init__(self, file: int, block: memoryview) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, args=(file, block), name="disk", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        self._thread.join()

    def finish(self) -> None:
        """Wait, and raise what the writing raised."""
        self.wait()
        if self._error is not None:
            raise self._error

    def _write(self, file: int, block: memoryview) -> None:
        try:
            _write_block(file, block)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._error = error


def _memory() -> memoryview:
    """Room for a block, aligned as a direct write wants it.

    Shared, as a fork could otherwise change what is being written (open(2), Notes), and children are started at any time. It is
    never closed by name: an error's traceback may still hold views of it.
    """
    return memoryview(mmap.mmap(-1, BLOCK_BYTES, flags=mmap.MAP_SHARED))


def _write_block(file: int, block: memoryview) -> None:
    written = 0
    try:
        _allow_direct(file, is_allowed=True)
        written = os.write(file, block)
    except OSError as error:
        # The file system can't, or not from a place like this.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    _allow_direct(file, is_allowed=False)
    _write_all(file, block[written:])


def _write_all(file: int, rest: memoryview) -> None:
    while rest:
        rest = rest[os.write(file, rest) :]


def _allow_direct(file: int, *, is_allowed: bool) -> None:
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT if is_allowed else flags & ~os.O_DIRECT)
