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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from athena_backup.volume_entry import DIRECTORY_FLAGS, open_quietly

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_EMPTY_PATH, _STATX_BTIME = 0x1000, 0x800
_STATX_BYTES = 256
# Of struct statx (statx(2)): the mask at its beginning, and the seconds and nanoseconds of the time of birth.
_MASK, _BIRTH = struct.Struct("=I"), struct.Struct("=qI")
_BIRTH_OFFSET = 80
_COARSE_NANOSECONDS = 20_000_000
"""By which the clock that dates what is made may differ from ours: a tick of it, and some more (clock_gettime(2))."""


@dataclass(frozen=True)
class Found:
    """A folder that was sought: its number, its path now, and an open descriptor of it, which who seeks closes."""

    inode: int
    path: bytes
    descriptor: int


@dataclass
class Moved:
    """What a walk has listed, entered and not found; numbers are those of listings (readdir(3)), here and there."""

    began_ns: int = field(default_factory=time.time_ns)
    missing: dict[int, bytes] = field(default_factory=dict)
    """Of folders that were not there any more: their numbers, and the paths that they had."""
    replaced: dict[int, bytes] = field(default_factory=dict)
    """The same of those in whose place another folder was."""
    entered: set[int] = field(default_factory=set)
    """Those that are read, under whatever name."""

    def enter(self, inode: int) -> None:
        """Note a folder that is read, under whatever name."""
        self.entered.add(inode)

    def is_entered(self, inode: int) -> bool:
        """Whether it was read already, as one that was moved to where the walk came later."""
        return inode in self.entered

    def seek(self, root: int, device: int, depth_limit: int, check: Callable[[], None], skip: bytes) -> Iterator[Found]:
        """Every folder that is missing or was replaced and is still somewhere below the open ``root``, but not read yet.

        One that was made since the walk began has but taken over the number of one that is gone. Names at the root that begin
        with ``skip`` are left out.
        """
        for found in _folders(root, b"", device, depth_limit, check, skip):
            is_sought = found.inode in self.missing or found.inode in self.replaced
            if is_sought and not self.is_entered(found.inode) and not self._is_new(found.descriptor):
                yield found

    def _is_new(self, folder: int) -> bool:
        born_ns = _birth_ns(folder)
        return born_ns is not None and born_ns > self.began_ns + _COARSE_NANOSECONDS


def _folders(
    folder: int, path: bytes, device: int, depth_limit: int, check: Callable[[], None], skip: bytes
) -> Iterator[Found]:
    """Every folder below an open one, each before what is in it; what can't be looked at is passed over: the walk has told."""
    check()
    below: list[tuple[bytes, int]] = []
    with contextlib.suppress(OSError), os.scandir(folder) as items:
        for item in items:
            name = os.fsencode(item.name)
            if item.is_dir(follow_symlinks=False) and (path or not name.startswith(skip)):
                below.append((name, item.inode()))
    for name, inode in below:
        try:
            descriptor = open_quietly(name, DIRECTORY_FLAGS, folder)
        except OSError:
            continue
        try:
            status = os.fstat(descriptor)
            # What was listed may be elsewhere by now: who takes what is found may be at it for hours.
            if status.st_dev == device and status.st_ino == inode:
                yield Found(inode, path + name, descriptor)
                if depth_limit:
                    yield from _folders(descriptor, path + name + b"/", device, depth_limit - 1, check, skip)
        finally:
            os.close(descriptor)


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
