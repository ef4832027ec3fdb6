"""Folders that are renamed while a tree is walked, before the walk has come to them: nobody would have read what is in them.

The walk listed their names hours ago, and the folder above their new place it may have left already. They are sought by their
inode numbers when everything else has been read, and given under the names that they had when they were listed: no other entry
has those, and the folders above them are in the archive.
"""

import contextlib
import ctypes
import os
import struct
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from athena_backup.volume_entry import DIRECTORY_FLAGS, open_quietly

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_EMPTY_PATH, _STATX_BTIME = 0x1000, 0x800
_STATX_BYTES = 256
# Of struct statx (statx(2)): the mask at its beginning, and the seconds and nanoseconds of the time of birth.
_MASK, _BIRTH = struct.Struct("=I"), struct.Struct("=qI")
_BIRTH_OFFSET = 80
_COARSE_NANOSECONDS = 20_000_000
"""By which the clock that dates what is made may be behind ours: a tick of it, and some more (clock_gettime(2))."""

_STEP_NANOSECONDS = 2_000_000_000
"""Of the times of folders, where they have the longest steps (FAT)."""


class Lost(NamedTuple):
    """A folder that was not where it was listed: its path there, and whether something else is there now."""

    path: bytes
    is_replaced: bool


class Found(NamedTuple):
    """A folder that was sought: its number, and an open descriptor of it, which who seeks closes."""

    inode: int
    descriptor: int


@dataclass
class Moved:
    """The folders that one walk has listed and not found; numbers are those of listings (readdir(3)), here and there."""

    began_ns: int = field(default_factory=time.time_ns)
    _lost: dict[int, Lost] = field(default_factory=dict)
    _entered: set[int] = field(default_factory=set)

    def lose(self, inode: int, lost: Lost) -> bool:
        """Note a folder that was not there any more; False where another one has its number: it can't be found by that."""
        return self._lost.setdefault(inode, lost) == lost

    def forget(self, inodes: Iterable[int]) -> None:
        """Take back what was noted of folders that are not lost."""
        for inode in inodes:
            self._lost.pop(inode, None)

    def enter(self, inode: int) -> None:
        """Note a folder that is read, under whatever name."""
        self._entered.add(inode)

    def is_entered(self, inode: int) -> bool:
        """Whether it was read already, as one that was moved to where the walk came later."""
        return inode in self._entered

    def take(self) -> dict[int, Lost]:
        """What was lost since this was asked last, by number."""
        taken, self._lost = self._lost, {}
        return taken

    def seek(
        self, sought: Container[int], root: int, device: int, depth_limit: int, check: Callable[[], None], skip: bytes
    ) -> Iterator[Found]:
        """Those of the numbers ``sought`` that are still somewhere below the open ``root``, and not read yet.

        One that was made since the walk began has but taken over the number of one that is gone; one that may have been is left
        out too. Names at the root that begin with ``skip`` are left out.
        """
        for found in _folders(root, device, depth_limit, check, skip):
            is_wanted = found.inode in sought and not self.is_entered(found.inode)
            if is_wanted and not self._is_new(found.descriptor):
                yield found

    def _is_new(self, folder: int) -> bool:
        """Whether a folder may have been made since the walk began.

        An old one that is taken for a new one is told as vanished, a new one that is taken for an old one is stored under a name
        that it never had: what is as young as the walk is believed to be new.
        """
        made_ns = _birth_ns(folder)
        if made_ns is None:
            # No birth is later than the last change of what is in the folder, and a rename of the folder itself is none.
            made_ns = os.fstat(folder).st_mtime_ns
        return made_ns > self.began_ns - _COARSE_NANOSECONDS


def last_change_ns(folder: int) -> int | None:
    """When the names in an open folder last changed; None if so lately that another change might not show. Raises `OSError`."""
    changed_ns = os.fstat(folder).st_ctime_ns
    return changed_ns if changed_ns < time.time_ns() - _STEP_NANOSECONDS else None


def files_below(folder: int, device: int, depth_limit: int, check: Callable[[], None]) -> int:
    """How many entries that are no folders lie below an open one, on its own file system."""
    own = _entries(folder)
    below = _folders(folder, device, depth_limit, check)
    return sum(inode is None for _, inode in own) + sum(
        inode is None for found in below for _, inode in _entries(found.descriptor)
    )


def _folders(
    folder: int, device: int, depth_limit: int, check: Callable[[], None], skip: bytes | None = None
) -> Iterator[Found]:
    """Every folder below an open one, each before what is in it; what can't be looked at is passed over: the walk has told."""
    check()
    for name, inode in [(name, inode) for name, inode in _entries(folder) if inode is not None]:
        if skip is not None and name.startswith(skip):
            continue
        try:
            descriptor = open_quietly(name, DIRECTORY_FLAGS, folder)
        except OSError:
            continue
        try:
            status = os.fstat(descriptor)
            # What was listed may be elsewhere by now: who takes what is found may be at it for hours.
            if status.st_dev == device and status.st_ino == inode:
                yield Found(inode, descriptor)
                if depth_limit:
                    yield from _folders(descriptor, device, depth_limit - 1, check)
        finally:
            os.close(descriptor)


def _entries(folder: int) -> Iterator[tuple[bytes, int | None]]:
    """The names in an open folder, and of those that are folders the numbers."""
    with contextlib.suppress(OSError), os.scandir(folder) as items:
        for item in items:
            yield os.fsencode(item.name), item.inode() if item.is_dir(follow_symlinks=False) else None


def _birth_ns(descriptor: int) -> int | None:
    """When the open file was made, where its file system tells (statx(2))."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    try:
        failed = _LIBC.statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer)
    except AttributeError:  # an older C library
        return None
    if failed or not _MASK.unpack_from(buffer)[0] & _STATX_BTIME:
        return None
    seconds, nanoseconds = _BIRTH.unpack_from(buffer, _BIRTH_OFFSET)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)
