"""A new file's bytes to the disk past the page cache (open(2), O_DIRECT), where the file system can.

Copies of what nobody reads soon would take the cache's memory from the databases of the same machine, and making them costs a
tenth of a whole backup's processor time (tried). Where the file system refuses, the file is written like any other.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable

BLOCK_BYTES = 4 << 20
"""What one write hands to the disk; what is left of a file at its end goes through the page cache."""


def write_direct(file: int, chunks: Iterable[bytes]) -> None:
    """Write all ``chunks`` into the open, empty ``file``; to sync and to close it is the caller's.

    Raises `OSError` of a write, and whatever ``chunks`` raises.
    """
    # A direct write wants its memory aligned, and shared: a fork meanwhile could otherwise change what is written (open(2),
    # Notes), and children are started at any time. It is not closed here, where an error's traceback may still hold views.
    block = memoryview(mmap.mmap(-1, BLOCK_BYTES, flags=mmap.MAP_SHARED))
    filled = 0
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            taken = min(len(rest), BLOCK_BYTES - filled)
            block[filled : filled + taken] = rest[:taken]
            rest, filled = rest[taken:], filled + taken
            if filled == BLOCK_BYTES:
                _write_block(file, block)
                filled = 0
    _write_all(file, block[:filled])


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
