"""The staging place of a restore: ``.athena-{restore id}/`` inside the volume, reached by descriptors, removed safely.

In it: ``new/`` (what was extracted), ``old/`` (what was live), ``met/`` (what live writers put in the way meanwhile),
``state``, ``time``, ``mode`` and ``loss`` (links whose texts say how far the switch is, which time and mode the root gets, and
whether it may lack what can't be set), ``lock``.
Making and removing it leaves the time of the volume's root as it was (unless a kill comes between the two calls that this takes).
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from athena_backup.errors import AthenaError, DeniedError, FinalError, FullError
from athena_backup.volume_entry import shown
from athena_backup.volume_walk import STAGING_PREFIX

NEW, OLD, MET, LOCK = b"new", b"old", b"met", b"lock"
STATE, TIME, MODE, LOSS = b"state", b"time", b"mode", b"loss"
MOVING_OUT, MOVING_IN, SWITCHED = b"moving out", b"moving in", b"switched"
"""The states of a switch; `volume_exchange` tells what each means."""
LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_RESTORE_ID = re.compile(r"[0-9a-f]{12}", re.ASCII)
_DEFAULT_ACL = "system.posix_acl_default"
_READ_ADVICE = "give the service the right to read it"
"""Where a volume is only looked at: a backup may not be advised to write there."""
_AGAIN_LIMIT = 1_000
"""How often a folder that is filled anew while it is removed is emptied again."""
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def staging_name(restore_id: str) -> bytes:
    """The name of a restore's staging place; raises `FinalError` for what is no restore's id."""
    if not _RESTORE_ID.fullmatch(restore_id):
        raise FinalError(f"{restore_id!r} is not the id of a restore: 12 hex digits")
    return STAGING_PREFIX + restore_id.encode()


def leftovers(root: Path) -> list[str]:
    """The ids of restores whose staging place lies in the volume; none where there is no such directory."""
    prefix = STAGING_PREFIX.decode()
    with told(root, _READ_ADVICE):
        try:
            with os.scandir(root) as found:
                names = [item.name for item in found if item.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
    found_ids = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return sorted(found_id for found_id in found_ids if _RESTORE_ID.fullmatch(found_id))


def state(staging: int) -> bytes | None:
    """How far the switch of an open staging place is; None where it was not begun."""
    try:
        return os.fsencode(os.readlink(STATE, dir_fd=staging))
    except FileNotFoundError:
        return None


def half_switched(root: Path) -> list[str]:
    """The ids of restores whose switch of this volume was begun and not ended: what is live is neither old nor new."""
    half = []
    with told(root, _READ_ADVICE):
        for restore_id in leftovers(root):
            with (
                contextlib.suppress(FileNotFoundError),
                opened_root(root) as descriptor,
                opened_folder(descriptor, staging_name(restore_id)) as staging,
            ):
                if state(staging) in (MOVING_OUT, MOVING_IN):
                    half.append(restore_id)
    return half


@contextlib.contextmanager
def opened_root(root: Path) -> Iterator[int]:
    """A descriptor of the volume's root; the root itself may be a symbolic link, as operators make them."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def opened_folder(parent: int, name: bytes, *, make: bool = False) -> Iterator[int]:
    """A folder in ``parent``; with ``make`` one that is made where it is missing."""
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
    descriptor = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def made_staging(root: Path, restore_id: str) -> Iterator[int]:
    """The staging place of a restore, made where it is missing, seen by nobody but us."""
    with opened_root(root) as descriptor:
        before = os.fstat(descriptor)
        with opened_folder(descriptor, staging_name(restore_id), make=True) as staging:
            # All that is made below would inherit it from the live root, and from all restored folders what comes later (acl(5)).
            try:
                os.removexattr(staging, _DEFAULT_ACL)
            except OSError as error:
                if error.errno not in (errno.ENODATA, errno.ENOTSUP):
                    raise
            # Made now: where the staging fills the last inode, it can only be removed under a lock that is there already.
            os.close(os.open(LOCK, LOCK_FLAGS, 0o600, dir_fd=staging))
            set_root_time(descriptor, before.st_mtime_ns)
            os.fsync(descriptor)
            yield staging


def remove_staging(root: int, name: bytes, root_mtime_ns: int) -> None:
    """Remove a staging place with all that is in it, and give the open root its time. Raises `OSError`."""
    with opened_folder(root, name) as staging:
        # The state goes last: a removal that is killed goes on as what it was.
        _empty(staging, keep=(STATE, TIME))
        _empty(staging)
    _remove_folder(root, name)
    set_root_time(root, root_mtime_ns)
    os.fsync(root)


def set_root_time(root: int, mtime_ns: int) -> None:
    """Give an open root its time. That of somebody else keeps what it has: only its owner may set it, and nothing depends on it."""
    with contextlib.suppress(PermissionError):
        os.utime(root, ns=(os.fstat(root).st_atime_ns, mtime_ns))


def _remove_folder(root: int, name: bytes) -> None:
    try:
        os.rmdir(name, dir_fd=root)
    except PermissionError:
        # The set's root is one that not even its owner may write to, and by now so is this. A kill in between leaves it writable.
        mode = stat.S_IMODE(os.fstat(root).st_mode)
        os.fchmod(root, mode | stat.S_IWUSR)
        try:
            os.rmdir(name, dir_fd=root)
        finally:
            os.fchmod(root, mode)


@dataclass
class _Level:
    """An open folder that is being emptied, its name in the one above, and the folders in it that are still to go."""

    descriptor: int
    name: bytes
    below: list[bytes]


def _empty(folder: int, keep: tuple[bytes, ...] = ()) -> None:
    """Remove everything in an open folder, by descriptors, following nothing, without recursion's limit on depth.

    Every folder is listed once: listed again for each folder in it, one with 100,000 of them would take hours.
    """
    device = os.fstat(folder).st_dev
    levels = [_Level(folder, b"", _remove_files(folder, keep))]
    again = 0
    try:
        while levels:
            level = levels[-1]
            if level.below:
                name = level.below.pop()
                with contextlib.suppress(FileNotFoundError):
                    descriptor = _open_for_removal(level.descriptor, name)
                    levels.append(_Level(descriptor, name, []))
                    if os.fstat(descriptor).st_dev != device:
                        # A mount, or a subvolume of btrfs, which is renamed and removed like a folder: what is in it is in no set.
                        raise OSError(errno.EXDEV, "it is another file system, which is not removed", shown(name))
                    levels[-1].below = _remove_files(descriptor)
                continue
            levels.pop()
            if not levels:
                return
            os.close(level.descriptor)
            try:
                os.rmdir(level.name, dir_fd=levels[-1].descriptor)
            except FileNotFoundError:
                pass
            except OSError as error:
                # Whoever works in a replaced folder goes on making files in it (and removing them) while it is removed.
                again += 1
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or again > _AGAIN_LIMIT:
                    raise
                levels[-1].below.append(level.name)
    finally:
        for level in levels[1:]:
            os.close(level.descriptor)


def _remove_files(folder: int, keep: tuple[bytes, ...] = ()) -> list[bytes]:
    """Remove what is no folder in an open folder; the names of the folders in it."""
    below = []
    for name in map(os.fsencode, os.listdir(folder)):
        if name in keep:
            continue
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                below.append(name)
            else:
                os.unlink(name, dir_fd=folder)
    return below


def _open_for_removal(folder: int, name: bytes) -> int:
    with contextlib.suppress(PermissionError):
        descriptor = os.open(name, _FOLDER_FLAGS, dir_fd=folder)
        if not os.fstat(descriptor).st_mode & stat.S_IWUSR:
            with contextlib.suppress(PermissionError):
                os.fchmod(descriptor, 0o700)
        return descriptor
    # A folder that not even its owner may read; nobody else can put another in its place, the staging place is ours alone.
    os.chmod(name, 0o700, dir_fd=folder)
    return os.open(name, _FOLDER_FLAGS, dir_fd=folder)


@contextlib.contextmanager
def told(root: Path, if_denied: str = "run the restore as a user that may write there") -> Iterator[None]:
    """Translate what a volume's file system says while its staging place is made, switched or removed.

    ``if_denied`` is what can be done where this process lacks a right.
    """
    try:
        yield
    except OSError as error:
        raise _translated(root, error, if_denied) from None


def _translated(root: Path, error: OSError, if_denied: str) -> AthenaError:
    what = f"{root}: {error.strerror}" + (f" ({os.fsdecode(str(error.filename))})" if error.filename else "")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FullError(what, next_step="make room in the volume, then restore again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DeniedError(what, next_step=if_denied)
    return FinalError(what, next_step="look at the volume's directory and its mount")
