"""A staged volume takes the live one's place: entry by entry, inside the root directory, which keeps its inode.

Whoever has the directory open or mounted goes on seeing it ("volumes", section 5). The switch is not atomic to readers; a
switch that was killed is finished by `recover_volume`, one that was not begun is thrown away. What has been done is read
off the staging folder: `state` says which of the two phases has begun, the entries themselves say how far it came.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from athena_backup.errors import AthenaError, DeniedError, FinalError, FullError, PassingError
from athena_backup.manifest import Component
from athena_backup.operation import Operation
from athena_backup.store import Store
from athena_backup.volume_extract import extract_volume
from athena_backup.volume_walk import STAGING_PREFIX, shown

_RESTORE_ID = re.compile(r"[0-9a-f]{12}")
_NEW, _OLD, _MET, _STATE, _LOCK = b"new", b"old", b"met", b"state", b"lock"
_MOVING_OUT, _MOVING_IN, _SWITCHED = b"moving out", b"moving in", b"switched"
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_NOREPLACE = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def _staging_name(restore_id: str) -> bytes:
    if not _RESTORE_ID.fullmatch(restore_id):
        raise FinalError(f"{restore_id!r} is not the id of a restore")
    return STAGING_PREFIX + restore_id.encode()


def leftovers(root: Path) -> list[str]:
    """The ids of restores whose staging folder lies in the volume."""
    with _told(root):
        names = os.listdir(root) if root.is_dir() else []
    prefix = STAGING_PREFIX.decode()
    return sorted(
        n.removeprefix(prefix) for n in names if n.startswith(prefix) and _RESTORE_ID.fullmatch(n.removeprefix(prefix))
    )


def preflight_volume(component: Component, root: Path, restore_id: str) -> list[AthenaError]:
    """Everything that would keep this volume from being restored; makes the staging folder and a probe file in it.

    What the set's owners, modes and attributes ask for is really set on the probe ("volumes", section 4).
    """
    facts = component.volume
    if facts is None:
        return [FinalError("the manifest holds no facts about this volume")]
    if not root.is_dir():
        return [FinalError(f"{root} is not a directory", next_step="mount or make it, or correct ATHENA_VOLUMES")]
    faults: list[AthenaError] = []
    inside = mount_points(root)
    if inside:
        faults.append(
            FinalError(f"{', '.join(inside)} is mounted inside {root}", next_step="unmount it during the restore")
        )
    status = os.statvfs(root)
    free_bytes = status.f_bavail * status.f_frsize
    if free_bytes < facts.content_bytes:
        faults.append(
            FullError(
                f"{root} has {free_bytes} bytes free, the set holds {facts.content_bytes}",
                next_step="make room beside what is live",
            )
        )
    if facts.devices:
        faults.append(FinalError("the set holds device nodes, which a volume's restore does not make"))
    try:
        with _told(root), _staging(root, restore_id) as staging:
            faults += _probe(staging, component)
    except AthenaError as error:
        faults.append(error)
    return faults


def _probe(staging: int, component: Component) -> list[AthenaError]:
    facts = component.volume
    if facts is None:
        return []
    faults: list[AthenaError] = []

    def attempt(what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            advice = "run the restore as root, on a file system that has them"
            faults.append(DeniedError(f"{what} can't be set here: {error.strerror}", next_step=advice))

    probe = os.open(
        b"probe", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=staging
    )
    try:
        own = os.fstat(probe)
        for uid in facts.uids:
            if uid != own.st_uid:
                attempt(f"the owner {uid}", lambda: os.fchown(probe, uid, -1))  # noqa: B023
        for gid in facts.gids:
            if gid != own.st_gid:
                attempt(f"the group {gid}", lambda: os.fchown(probe, -1, gid))  # noqa: B023
        with contextlib.suppress(OSError):
            os.fchown(probe, own.st_uid, own.st_gid)
        if facts.special_modes:
            attempt("setuid and setgid bits", lambda: os.fchmod(probe, 0o6755))
        values = {"user": ("user.athena-probe", b"1"), "trusted": ("trusted.athena-probe", b"1")}
        for kind in facts.xattr_classes:
            if kind in values:
                name, value = values[kind]
                attempt(f"extended attributes of class {kind}", lambda: os.setxattr(probe, name, value))  # noqa: B023
            elif kind == "security" and os.geteuid() != 0:
                faults.append(
                    DeniedError("security attributes can be set by root only", next_step="run the restore as root")
                )
    finally:
        os.close(probe)
        os.unlink(b"probe", dir_fd=staging)
    return faults


def stage_volume(component: Component, store: Store, root: Path, restore_id: str, operation: Operation) -> None:
    """Extract the component into its staging folder beside what is live, and sync it; a failed try leaves no staging."""
    discard_volume(root, restore_id)
    operation.expect(component.name, component.raw_size_bytes)
    try:
        with _told(root), _staging(root, restore_id) as staging:
            os.mkdir(_NEW, 0o700, dir_fd=staging)
            new = os.open(_NEW, _DIRECTORY_FLAGS, dir_fd=staging)
            try:
                extract_volume(component, store, new, operation)
                _sync_file_system(new)
            finally:
                os.close(new)
    except BaseException:
        with contextlib.suppress(AthenaError):
            discard_volume(root, restore_id)
        raise


def switch_volume(root: Path, restore_id: str, operation: Operation) -> None:
    """Put the staged entries in the place of the live ones; a repeated call finishes what an earlier one began.

    Raises `FinalError`, with nothing moved, where another file system is mounted inside the volume.
    """
    operation.check()
    inside = mount_points(root)
    if inside:
        raise FinalError(f"{', '.join(inside)} is mounted inside {root}", next_step="unmount it during the restore")
    with _told(root), _locked_staging(root, restore_id) as (root_descriptor, staging):
        if _state(staging) is None:
            _set_state(staging, _MOVING_OUT)
        _roll_forward(root_descriptor, staging)
    discard_volume(root, restore_id)


def recover_volume(root: Path, restore_id: str) -> bool:
    """Finish a switch that had begun, throw away a staging whose switch had not; True if it was finished forward."""
    with _told(root), _locked_staging(root, restore_id) as (root_descriptor, staging):
        begun = _state(staging) is not None
        if begun:
            _roll_forward(root_descriptor, staging)
    discard_volume(root, restore_id)
    return begun


def _roll_forward(root: int, staging: int) -> None:
    """Both phases, from wherever they stand. Every rename is of one entry and replaces nothing."""
    if _state(staging) == _MOVING_OUT:
        with _folder(staging, _OLD) as old:
            for name in _live_names(root):
                _move(root, name, old, name, staging)
        os.fsync(root)
        _set_state(staging, _MOVING_IN)
    if _state(staging) == _MOVING_IN:
        with _folder(staging, _NEW) as new:
            for name in sorted(os.fsencode(name) for name in os.listdir(new)):
                _move(new, name, root, name, staging)
            _take_over_attributes(new, root)
        os.fsync(root)
        _set_state(staging, _SWITCHED)


def _move(source: int, name: bytes, target: int, new_name: bytes, staging: int) -> None:
    """Rename one entry; what a live writer has put in its way meanwhile is put aside, never replaced."""
    for number in range(1_000):
        if _LIBC.renameat2(source, name, target, new_name, _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code == errno.ENOENT:
            return
        if code != errno.EEXIST:
            raise OSError(code, os.strerror(code), shown(name))
        with _folder(staging, _MET) as met:
            os.rename(new_name, b"%d-%d-%s" % (os.getpid(), number, new_name[:200]), src_dir_fd=target, dst_dir_fd=met)
    raise PassingError(
        f"{shown(name)} is made again and again while the volume is switched", next_step="stop the volume's users"
    )


def _take_over_attributes(new: int, root: int) -> None:
    status = os.fstat(new)
    current = os.fstat(root)
    if (status.st_uid, status.st_gid) != (current.st_uid, current.st_gid):
        os.fchown(root, status.st_uid, status.st_gid)
    os.fchmod(root, stat.S_IMODE(status.st_mode))
    with contextlib.suppress(OSError):  # a file system without attributes has none to take over
        for name in os.listxattr(new):
            os.setxattr(root, name, os.getxattr(new, name))


def discard_volume(root: Path, restore_id: str) -> None:
    """Remove a restore's staging folder with all that is in it, the replaced entries of a finished switch included.

    Refused with `FinalError` while its switch has begun and not ended: what is in it then is needed. Keeps the root's time.
    """
    name = _staging_name(restore_id)
    with _told(root):
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            try:
                staging = os.open(name, _DIRECTORY_FLAGS, dir_fd=descriptor)
            except FileNotFoundError:
                return
            try:
                state = _state(staging)
                if state in (_MOVING_OUT, _MOVING_IN):
                    raise FinalError(
                        f"{root}: the switch of restore {restore_id} has begun and not ended: it is recovered, not discarded"
                    )
                mtime_ns = _root_time(staging) if state == _SWITCHED else status.st_mtime_ns
                _empty(staging)
            finally:
                os.close(staging)
            os.rmdir(name, dir_fd=descriptor)
            os.utime(descriptor, ns=(status.st_atime_ns, mtime_ns))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _root_time(staging: int) -> int:
    """The time that the volume's root had in the set: that of the (by now empty) folder into which it was extracted."""
    try:
        return int(os.readlink(b"time", dir_fd=staging))
    except FileNotFoundError:
        return os.stat(_NEW, dir_fd=staging).st_mtime_ns


def _empty(folder: int) -> None:
    """Remove everything in an open folder, by descriptors, following nothing."""
    with contextlib.suppress(PermissionError):
        os.fchmod(folder, 0o700)
    for name in os.listdir(folder):
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            os.unlink(name, dir_fd=folder)
            continue
        try:
            inner = os.open(name, _DIRECTORY_FLAGS, dir_fd=folder)
        except PermissionError:
            os.chmod(name, 0o700, dir_fd=folder)
            inner = os.open(name, _DIRECTORY_FLAGS, dir_fd=folder)
        try:
            _empty(inner)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=folder)


@contextlib.contextmanager
def _staging(root: Path, restore_id: str) -> Iterator[int]:
    """The staging folder, made where it is missing."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        times = os.fstat(descriptor)
        name = _staging_name(restore_id)
        try:
            os.mkdir(name, 0o700, dir_fd=descriptor)
            os.utime(descriptor, ns=(times.st_atime_ns, times.st_mtime_ns))
            os.fsync(descriptor)
        except FileExistsError:
            pass
        staging = os.open(name, _DIRECTORY_FLAGS, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    try:
        yield staging
    finally:
        os.close(staging)


@contextlib.contextmanager
def _locked_staging(root: Path, restore_id: str) -> Iterator[tuple[int, int]]:
    """Root and staging folder, with the fence held: two processes never exchange one volume (design.md, section 6)."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        staging = os.open(_staging_name(restore_id), _DIRECTORY_FLAGS, dir_fd=descriptor)
        try:
            lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=staging)
            try:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise PassingError(f"another process is exchanging {root}") from None
                yield descriptor, staging
            finally:
                os.close(lock)
        finally:
            os.close(staging)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _folder(staging: int, name: bytes) -> Iterator[int]:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=staging)
    descriptor = os.open(name, _DIRECTORY_FLAGS, dir_fd=staging)
    try:
        yield descriptor
    finally:
        os.fsync(descriptor)
        os.close(descriptor)


def _live_names(root: int) -> list[bytes]:
    return sorted(name for name in map(os.fsencode, os.listdir(root)) if not name.startswith(STAGING_PREFIX))


def _state(staging: int) -> bytes | None:
    try:
        return os.fsencode(os.readlink(_STATE, dir_fd=staging))
    except FileNotFoundError:
        return None


def _set_state(staging: int, state: bytes) -> None:
    """Replace the state in one step. A link's text is written with its name, so it can't be there without it."""
    if state == _MOVING_OUT:
        with contextlib.suppress(FileExistsError):
            os.symlink(b"%d" % os.stat(_NEW, dir_fd=staging).st_mtime_ns, b"time", dir_fd=staging)
    temporary = _STATE + b".next"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=staging)
    os.symlink(state, temporary, dir_fd=staging)
    os.replace(temporary, _STATE, src_dir_fd=staging, dst_dir_fd=staging)
    os.fsync(staging)


def mount_points(root: Path) -> list[str]:
    """Where other file systems are mounted inside a directory (proc_pid_mountinfo(5))."""
    own = os.path.realpath(root).rstrip("/") + "/"
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        place = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match.group(1), 8)]), line.split()[4])
        if os.fsdecode(place).startswith(own):
            found.append(os.fsdecode(place))
    return found


def _sync_file_system(descriptor: int) -> None:
    if _LIBC.syncfs(descriptor) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def _told(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"{root}: {error.strerror}" + (f" ({error.filename!r})" if error.filename else "")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FullError(what, next_step="make room in the volume, then restore again") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DeniedError(what, next_step="run the restore as a user that may write there") from None
        raise FinalError(what) from None
