"""What at a volume's root no switch could move, found without moving anything (rename(2)).

Called by `volume_preflight`. A switch that meets such an entry moves everything back; but by then other components of the set
may have been switched, which stay as they are.
"""

import contextlib
import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from athena_backup.errors import AthenaError, DeniedError, FinalError
from athena_backup.volume_entry import Some
from athena_backup.volume_staging import opened_folder
from athena_backup.volume_walk import STAGING_PREFIX

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH = 0x100, 0x1000
# Of struct statx (statx(2)): the attributes that an entry has, and behind other things those that its file system knows.
_STATX_BYTES = 256
_FLAGS, _FLAGS_OFFSET, _KNOWN_OFFSET = struct.Struct("=Q"), 8, 56
_IMMUTABLE, _APPEND_ONLY = 0x10, 0x20
_STATFS_BYTES = 256
_OVERLAY = 0x794C7630
"""The type of an overlay (statfs(2))."""
_FULL = b"probe-full"


class _Obstacle(NamedTuple):
    """Why entries can't be moved, and what to do about it."""

    kind: type[AthenaError]
    cause: str
    next_step: str


_FIXED = _Obstacle(FinalError, "immutable or append-only (chattr)", "chattr -i -a them during the restore")
_FOREIGN = _Obstacle(
    DeniedError,
    "of somebody else, and not to be written to by this process",
    "remove them, move them out of the volume, let the service's user write to them, or run the restore as root",
)
_STICKY = _Obstacle(
    DeniedError,
    "of somebody else, in a root that is sticky and somebody else's too",
    "chmod -t the root during the restore, give it or them to the service's user, or run the restore as root",
)
_LOWER = _Obstacle(
    FinalError,
    "of a lower layer of an overlay, as what a container's image holds is",
    "restore to a volume that is mounted, or replace them by copies (cp -a)",
)


def root_is_fixed(root: int) -> bool:
    """Whether nothing may be moved out of an open root, or nothing be made in it, because of its own attributes (chattr(1))."""
    return _is_fixed(root, b"", _AT_EMPTY_PATH)


def entry_faults(place: Path, root: int) -> list[AthenaError]:
    """A fault for each thing that keeps entries of the open root, which is ``place``, from being moved; it names some of them.

    None where this process may not write to the root: who makes the staging place is told so. Raises `OSError` where the root
    can't be listed.
    """
    if not os.access(place, os.W_OK, effective_ids=True):
        return []
    status, own = os.fstat(root), os.geteuid()
    is_sticky = bool(status.st_mode & stat.S_ISVTX) and own not in (0, status.st_uid)
    # Where the file system knows no such attributes, as NFS, not every entry has to be looked at over a network.
    has_flags = _is_fixed(root, b"", _AT_EMPTY_PATH, _KNOWN_OFFSET)

    def obstacle(item: os.DirEntry[str]) -> _Obstacle | None:
        if has_flags and _is_fixed(root, os.fsencode(item.name), _AT_SYMLINK_NOFOLLOW):
            return _FIXED
        is_folder = item.is_dir(follow_symlinks=False)
        if not (is_sticky or is_folder) or item.stat(follow_symlinks=False).st_uid == own:
            return None  # a folder of ours is made writable while it is moved
        if is_sticky:
            return _STICKY
        return None if os.access(item.name, os.W_OK, dir_fd=root, effective_ids=True) else _FOREIGN

    found: dict[_Obstacle, Some] = {}
    with os.scandir(root) as items:
        for item in items:
            # One that goes meanwhile is in nobody's way.
            with contextlib.suppress(OSError):
                what = None if item.name.startswith(STAGING_PREFIX.decode()) else obstacle(item)
                if what is not None:
                    found[what] = found.get(what, Some()).and_another(os.fsencode(item.name))
    return _faults(place, found)


def overlay_faults(place: Path, root: int, staging: int) -> list[AthenaError]:
    """A fault where the open root, which is ``place``, is an overlay's and has folders of a lower layer, which can't be renamed.

    Only a rename tells (EXDEV). It is one to a folder of ``staging`` that is not empty, which no rename may replace.
    """
    if not _is_overlay(root):
        return []
    named = Some()
    with _full_folder(staging), os.scandir(root) as items:
        for item in items:
            if item.name.startswith(STAGING_PREFIX.decode()):
                continue
            with contextlib.suppress(OSError):
                if item.is_dir(follow_symlinks=False) and _is_of_another_layer(root, item.name, staging):
                    named = named.and_another(os.fsencode(item.name))
    return _faults(place, {_LOWER: named} if named.count else {})


def _faults(place: Path, found: dict[_Obstacle, Some]) -> list[AthenaError]:
    return [
        obstacle.kind(f"no switch can move {named} in {place}: {obstacle.cause}", next_step=obstacle.next_step)
        for obstacle, named in found.items()
    ]


def _is_fixed(folder: int, name: bytes, how: int, offset: int = _FLAGS_OFFSET) -> bool:
    """Whether an entry is immutable or append-only, or with the other offset could be (statx(2)); False where that can't be asked."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    try:
        failed = _LIBC.statx(folder, name, how, 0, buffer)
    except AttributeError:  # an older C library
        return False
    return not failed and bool(_FLAGS.unpack_from(buffer, offset)[0] & (_IMMUTABLE | _APPEND_ONLY))


def _is_overlay(folder: int) -> bool:
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    # The type comes first, as a long.
    return _LIBC.fstatfs(folder, buffer) == 0 and ctypes.c_long.from_buffer(buffer).value == _OVERLAY


@contextlib.contextmanager
def _full_folder(staging: int) -> Iterator[None]:
    """While the block lasts there is a folder in the staging place that is not empty."""
    with opened_folder(staging, _FULL, make=True) as full:
        with opened_folder(full, _FULL, make=True):
            pass
        try:
            yield
        finally:
            os.rmdir(_FULL, dir_fd=full)
            os.rmdir(_FULL, dir_fd=staging)


def _is_of_another_layer(root: int, name: str, staging: int) -> bool:
    try:
        os.rename(name, _FULL, src_dir_fd=root, dst_dir_fd=staging)
    except OSError as error:
        return error.errno == errno.EXDEV
    # No overlay does that; if one did, what is live goes back.
    os.rename(_FULL, name, src_dir_fd=staging, dst_dir_fd=root)
    return False
