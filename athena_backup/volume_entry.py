"""One entry of a live tree: what is known of it, and how it is opened so that nobody can put another in its place.

Used by the walk (`volume_walk`), by git's order (`volume_git`) and by whoever reads what they found (`volume_archive`).
"""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass

from athena_backup.errors import FinalError

LOOKS = 20
"""How often an entry that is replaced between the look at it and its opening is looked at again."""
_LEASE_SECONDS = 60
"""As long as the system lets anybody keep a file from others by default (/proc/sys/fs/lease-break-time), and some more."""
_LEASE_LOOK_SECONDS = 0.05
SOME = 5
"""How many names a sentence has."""
GONE = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR}
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry, found a moment ago: its path from the root, its status, and the open folder in which it lies.

    ``opened`` is a descriptor of the entry itself where it is open already (folders, git's packs); the walk closes it.
    """

    path: bytes
    status: os.stat_result
    folder: int
    opened: int | None = None
    is_object: bool = False
    """Named after its content by git: it never changes, and where it went its content went too."""
    is_passing: bool = False
    """A loose ref of git: when it vanishes, its value stands in packed-refs, which is read later."""

    @property
    def name(self) -> bytes:
        """The last segment of the path."""
        return self.path.rpartition(b"/")[2]


def open_entry(entry: Entry) -> tuple[int, os.stat_result] | None:
    """A descriptor of an entry's file and its status; None if there is no such file any more.

    Never follows a link, never blocks on a FIFO that took the file's place, and never gives another file than the last
    look found: one that was replaced by a rename is looked at again.
    """
    with reading(entry.path):
        if entry.opened is not None:
            return os.dup(entry.opened), entry.status
        status = entry.status
        try:
            for _ in range(LOOKS):
                descriptor = open_quietly(entry.name, FILE_FLAGS, entry.folder)
                now = os.fstat(descriptor)
                if stat.S_ISREG(now.st_mode) and is_same(status, now):
                    return descriptor, now
                os.close(descriptor)
                status = os.stat(entry.name, dir_fd=entry.folder, follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode) or status.st_dev != entry.status.st_dev:
                    return None
        except OSError as error:
            # ENXIO: a socket took its place (open(2)).
            if error.errno not in GONE and error.errno != errno.ENXIO:
                raise
    return None


def open_quietly(name: bytes, flags: int, folder: int) -> int:
    """Open like `open_without_atime`.

    Waits for whoever has a lease on the file, as file servers do: it has been told to give it up, and has to (fcntl(2), F_SETLEASE).
    """
    deadline = time.monotonic() + _LEASE_SECONDS
    while True:
        try:
            return open_without_atime(name, flags, folder)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_LEASE_LOOK_SECONDS)


def open_without_atime(name: bytes, flags: int, folder: int) -> int:
    """Open without touching the access time where that is permitted: O_NOATIME is for a file's owner only (open(2))."""
    try:
        return os.open(name, flags | os.O_NOATIME, dir_fd=folder)
    except PermissionError:
        return os.open(name, flags, dir_fd=folder)


@contextlib.contextmanager
def reading(path: bytes) -> Iterator[None]:
    """Translate an `OSError` into the error for an entry that is there and can't be read: EIO, ESTALE, EACCES, …"""
    try:
        yield
    except OSError as error:
        raise FinalError(
            f"{shown(path)} can't be read: {error.strerror}",
            next_step="mend it, or give the service the right to read it",
        ) from None


def shown(path: bytes) -> str:
    """A path for people, whatever bytes it has."""
    return path.decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class Some:
    """Of any number of names the first few, for a sentence: of a million nobody reads more, and they take no memory."""

    count: int = 0
    first: tuple[str, ...] = ()

    def and_another(self, name: bytes) -> "Some":
        """These and one more."""
        return Some(self.count + 1, self.first if len(self.first) == SOME else (*self.first, shown(name)))

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return ", ".join(self.first) + (f" and {more} more" if more else "")


def is_same(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether two looks saw one inode, of one type."""
    return (one.st_dev, one.st_ino, stat.S_IFMT(one.st_mode)) == (
        other.st_dev,
        other.st_ino,
        stat.S_IFMT(other.st_mode),
    )


def mount_of(name: bytes, folder: int) -> int:
    """The id of the mount that an entry of an open folder (``.``: the folder itself) lies in. Raises `OSError`.

    By /proc/self/fdinfo (proc_pid_fdinfo(5)): a device number can't tell, on an overlay each layer's files bear another.
    """
    descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as lines:
            return next(int(line.partition(":")[2]) for line in lines if line.startswith("mnt_id:"))
    finally:
        os.close(descriptor)
