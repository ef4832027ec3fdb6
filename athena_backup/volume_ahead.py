"""Looks at small files ahead of who walks over them, where their file system answers slowly.

What is seen here is never used: it is in the system's caches when the walk comes by and looks and reads for itself, by all its
rules (`volume_walk`). So a fault here is none, and whoever changes an entry meanwhile changes nothing.
"""

import contextlib
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from athena_backup.volume_entry import DIRECTORY_FLAGS, FILE_FLAGS, open_without_atime
from athena_backup.volume_latency import Helpers, Slowness, Way

_AHEAD = 64
"""So many entries of a folder, and of each folder among them so many, without those below it."""
_CONTENT_LIMIT_BYTES = 1 << 20
"""Of a file is read ahead at most; what is larger the system reads ahead by itself once it is read in order."""


class Ahead:
    """Goes ahead of one walk, with helpers once that is seen to be slow; ``content``: of files too, not only of their status."""

    def __init__(self, check: Callable[[], None], *, content: bool) -> None:
        self._content = content
        self._slowness = Slowness()
        self._helpers: Helpers[None] = Helpers(contextlib.nullcontext, check)

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._helpers.close()

    def names(self, folder: int, names: Sequence[bytes]) -> Iterator[bytes]:
        """The same names, of entries of the open ``folder``, each when the next ones are being looked at."""
        seen = 0
        shared: _Folder | None = None
        try:
            for index, name in enumerate(names):
                seen = max(seen, index)
                way = self._slowness.next()
                if way is Way.TIMED and seen < len(names):
                    # Of those that nobody has looked at yet.
                    began = time.perf_counter()
                    if self._look(folder, names[seen]):
                        self._slowness.note(time.perf_counter() - began)
                    seen += 1
                elif way is Way.HELPED:
                    shared = shared or _Folder(folder)
                    while seen < min(len(names), index + _AHEAD) and self._helpers.offer(
                        partial(self._enter, shared, names[seen])
                    ):
                        seen += 1
                yield name
        finally:
            if shared is not None:
                shared.is_left = True

    def _look(self, folder: int, name: bytes) -> bool:
        """Look at an entry as a walk does, and have a file's content read; whether it is a file."""
        with contextlib.suppress(OSError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                return False
            if self._content:
                self._read(folder, name, status.st_size)
            return True
        return False

    def _read(self, folder: int, name: bytes, size_bytes: int) -> None:
        descriptor = open_without_atime(name, FILE_FLAGS, folder)
        try:
            os.listxattr(descriptor)
            os.posix_fadvise(descriptor, 0, min(size_bytes, _CONTENT_LIMIT_BYTES), os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)

    def _enter(self, shared: "_Folder", name: bytes, _: None) -> None:
        """The same for a helper, and where it is a folder of this file system, for what is in it."""
        if shared.is_left or self._look(shared.descriptor, name):
            return
        with contextlib.suppress(OSError):
            status = os.stat(name, dir_fd=shared.descriptor, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode) or status.st_dev != os.fstat(shared.descriptor).st_dev:
                return
            inner = open_without_atime(name, DIRECTORY_FLAGS, shared.descriptor)
            try:
                for below in sorted(map(os.fsencode, os.listdir(inner)))[:_AHEAD]:
                    if shared.is_left:
                        return
                    self._look(inner, below)
            finally:
                os.close(inner)


class _Folder:
    """A folder that is open until the walk is done with it and nobody looks into it any more."""

    def __init__(self, folder: int) -> None:
        self.descriptor = os.dup(folder)
        self.is_left = False
        # Not by counting: what waits for a helper may be dropped.
        weakref.finalize(self, os.close, self.descriptor)
