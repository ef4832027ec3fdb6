"""A staged volume takes the live one's place: entry by entry, inside the root directory, which keeps its inode.

Whoever has the directory open or mounted goes on seeing it ("volumes", section 5). The switch is not atomic to readers. It
has these states, each a link's text in the staging place, put there in one step and synced before the next one begins:

    (none)      nothing live was touched         a recovery throws the staging away
    moving out  live entries go to `old/`        a recovery goes on; where an entry can't be moved, all go back
    moving in   staged entries go to the root    a recovery goes on
    switched    only `old/` is left to be removed

How far a phase has come is read off the entries themselves: what is still to be moved is still there. Whatever has to be
made for it is made before the first state, for a disk may be full: a switch that is reported as failed and left standing
would be gone on with by a later recovery, over what was written since.
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from athena_backup.crew import Crew
from athena_backup.errors import AthenaError, FinalError, PassingError
from athena_backup.manifest import Component
from athena_backup.operation import Operation
from athena_backup.store import Store
from athena_backup.volume_entry import shown
from athena_backup.volume_extract import METADATA_REFUSED, TOO_LARGE, OwnerMap, RestoredVolume, read_volume
from athena_backup.volume_preflight import foreign_root_faults, mount_points
from athena_backup.volume_staging import (
    LOCK,
    LOCK_FLAGS,
    LOSS,
    MET,
    MODE,
    MOVING_IN,
    MOVING_OUT,
    NEW,
    OLD,
    STATE,
    SWITCHED,
    TIME,
    leftovers,
    made_staging,
    opened_folder,
    opened_root,
    remove_staging,
    set_root_time,
    staging_name,
    state,
    told,
)
from athena_backup.volume_users import still_used, written_meanwhile
from athena_backup.volume_walk import STAGING_PREFIX

__all__ = ["discard_volume", "leftovers", "recover_volume", "stage_volume", "switch_volume"]

_RENAME_NOREPLACE = 1
_ROUNDS = 1_000
"""How often something that live writers make anew is put out of the way before the switch gives up."""
_LIBC = ctypes.CDLL(None, use_errno=True)
logger = logging.getLogger("athena_backup.volumes")


def stage_volume(
    component: Component,
    store: Store,
    root: Path,
    restore_id: str,
    operation: Operation,
    *,
    crew: Crew | None = None,
    allow_devices: bool = False,
    owner_map: OwnerMap | None = None,
    accept_metadata_loss: bool = False,
) -> RestoredVolume:
    """Extract the component into its staging place beside what is live, and sync it; a failed try leaves no staging.

    Options and errors as in `read_volume`; what loss is accepted here is accepted of the root in the switch.
    """
    discard_volume(root, restore_id)
    operation.expect(component.name, component.raw_size_bytes)
    try:
        with told(root), made_staging(root, restore_id) as staging, opened_folder(staging, NEW, make=True) as new:
            if accept_metadata_loss:
                _put_text(staging, LOSS, b"accepted")
            restored = read_volume(
                component,
                store,
                new,
                operation,
                crew=crew,
                allow_devices=allow_devices,
                owner_map=owner_map,
                accept_metadata_loss=accept_metadata_loss,
            )
            _sync_file_system(new)
            return restored
    except BaseException:
        with contextlib.suppress(AthenaError):
            discard_volume(root, restore_id)
        raise


def switch_volume(root: Path, restore_id: str, operation: Operation) -> list[str]:
    """Put the staged entries in the place of the live ones; a repeated call finishes what an earlier one began.

    Returns, in sentences for people, what those lose who went on using the volume meanwhile, and what could not be set of its
    root where `stage_volume` was told to accept that. Raises, with nothing moved, `FinalError` where another file system is
    mounted inside the volume or nothing is staged, and `DeniedError` where something could not be set and that was not accepted;
    and with everything moved back, where a live entry can't be moved. Only an error that says so leaves it in between.
    """
    operation.check()
    inside = mount_points(root)
    if inside:
        raise FinalError(f"{', '.join(inside)} is mounted inside {root}", next_step="unmount it during the restore")
    with told(root), _locked_staging(root, restore_id) as (descriptor, staging):
        if staging is None or (state(staging) is None and not _has(staging, NEW)):
            raise FinalError(f"{root} has no staged entries of restore {restore_id}", next_step="restore again")
        if state(staging) is None:
            _begin(root, descriptor, staging)
        try:
            sentences = _roll_forward(descriptor, staging)
        except (OSError, AthenaError) as error:
            if state(staging) is None:
                raise
            cause = error.cause if isinstance(error, AthenaError) else f"{error.strerror} ({error.filename})"
            kind = PassingError if isinstance(error, PassingError) else FinalError
            raise kind(
                f"{root} is neither wholly old nor wholly new, its switch broke off: {cause}",
                next_step="mend the cause, then restore again: that finishes this switch first",
            ) from error
        sentences += still_used(staging, staging_name(restore_id))
        _discard_replaced(descriptor, staging, restore_id)
        return sentences


def recover_volume(root: Path, restore_id: str) -> bool:
    """Finish a switch that had begun, throw away a staging whose switch had not; True if it was finished forward.

    May be called again at any time. Raises `PassingError` while another process is at it.
    """
    with told(root), _locked_staging(root, restore_id) as (descriptor, staging):
        if staging is None:
            return False
        if state(staging) is None:
            _discard(descriptor, staging, restore_id)
            return False
        for sentence in [*_roll_forward(descriptor, staging), *still_used(staging, staging_name(restore_id))]:
            logger.warning("%s, whose restore %s was killed in its switch: %s", root, restore_id, sentence)
        _discard_replaced(descriptor, staging, restore_id)
        return True


def discard_volume(root: Path, restore_id: str) -> None:
    """Remove a restore's staging place with all that is in it, the replaced entries of a finished switch included.

    Refused with `FinalError` while its switch has begun and not ended: what is in it then is needed.
    """
    with told(root), _locked_staging(root, restore_id) as (descriptor, staging):
        if staging is not None:
            _discard(descriptor, staging, restore_id)


def _discard(root: int, staging: int, restore_id: str) -> None:
    reached = state(staging)
    if reached in (MOVING_OUT, MOVING_IN):
        raise FinalError(
            f"the switch of restore {restore_id} has begun and not ended: it is recovered, not discarded",
            next_step="restart the service: it recovers before it does anything else",
        )
    mtime_ns = os.fstat(root).st_mtime_ns
    if reached == SWITCHED and _has(staging, TIME):
        mtime_ns, _ = _times(staging)
    remove_staging(root, staging_name(restore_id), mtime_ns)


def _discard_replaced(root: int, staging: int, restore_id: str) -> None:
    """Remove what a finished switch replaced. What can't be removed (an immutable file, one that NFS keeps for whoever has it
    open, a folder that is written to without end) makes no failure of a switch that is done; the next restore tries again."""
    try:
        _discard(root, staging, restore_id)
    except OSError as error:
        logger.warning(
            "what restore %s has replaced in %s can't be removed, and stays there as %s/%s: %s (%s)",
            *(restore_id, _place(root), shown(staging_name(restore_id)), shown(OLD), error.strerror, error.filename),
            exc_info=True,
        )


def _place(root: int) -> str:
    """Where an open root is, for people."""
    return os.readlink(f"/proc/self/fd/{root}")


def _begin(place: Path, root: int, staging: int) -> None:
    if not _has(staging, LOSS):
        # Found when everything has been moved it would leave the volume half switched.
        for fault in foreign_root_faults(place, root):
            raise fault
    _prepare(root, staging)
    try:
        _set_state(staging, MOVING_OUT)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(STATE, dir_fd=staging)
        raise


def _roll_forward(root: int, staging: int) -> list[str]:
    """Both phases, from wherever they stand. Every rename is of one entry and replaces nothing.

    Returns, in sentences, what of the result is not as the set has it, and what live writers lose.
    """
    sentences: list[str] = []
    # When some have been moved in already, these can't be told from what a live writer made.
    is_all_staged = state(staging) == MOVING_OUT
    if state(staging) == MOVING_OUT:
        try:
            _move_out(root, staging)
            _set_state(staging, MOVING_IN)
        except (OSError, AthenaError):
            if state(staging) == MOVING_OUT:
                _move_back(root, staging)
            raise
    if state(staging) == MOVING_IN:
        with opened_folder(staging, NEW) as new:
            staged = _names(new)
            for name in staged:
                _move(new, root, name, staging, aside=root)
            sentences += _take_over_attributes(new, root, staging)
            os.fsync(new)
        os.fsync(root)
        _set_state(staging, SWITCHED)
        sentences += written_meanwhile(root, staging, staged if is_all_staged else None)
    return sentences


def _move_out(root: int, staging: int) -> None:
    with opened_folder(staging, OLD, make=True) as old:
        # Again until there is nothing: what a live writer makes meanwhile belongs to the old state.
        for _ in range(_ROUNDS):
            live = [name for name in _names(root) if not name.startswith(STAGING_PREFIX)]
            if not live:
                break
            for name in live:
                _move(root, old, name, staging, aside=root)
        else:
            raise PassingError(
                f"{shown(live[0])} is made again and again during the switch", next_step="stop the volume's users"
            )
        os.fsync(old)
    os.fsync(staging)
    os.fsync(root)


def _move_back(root: int, staging: int) -> None:
    """Nothing staged has been moved yet: what is in `old/` goes back to where it was, and the switch has not begun.

    What live writers made meanwhile under the same names is theirs, and stays beside it.
    """
    with opened_folder(staging, OLD, make=True) as old, opened_folder(staging, MET, make=True) as met:
        for name in _names(old):
            _move(old, root, name, staging, aside=root)
        beside = []
        for name in _names(met):
            number, _, own = name.partition(b"-")
            beside.append(b"%b.athena-%b" % (own, number))
            _rename(met, root, name, beside[-1])
        os.fsync(old)
        os.fsync(met)
    if beside:
        logger.warning(
            "the switch of %s was taken back; what was written there meanwhile under names that are back in place is kept as %s",
            *(_place(root), ", ".join(map(shown, beside))),
        )
    set_root_time(root, _times(staging)[1])
    os.fsync(root)
    os.unlink(STATE, dir_fd=staging)
    os.fsync(staging)


def _move(source: int, target: int, name: bytes, staging: int, *, aside: int) -> None:
    """Rename one entry. Of two that have the name, the one in the open folder ``aside`` is a live writer's, made meanwhile:
    it is put into `met/`, so that nothing is ever replaced."""
    for _ in range(_ROUNDS):
        try:
            _rename(source, target, name, name)
            return
        except FileNotFoundError:
            return  # a live writer removed it
        except FileExistsError:
            with opened_folder(staging, MET, make=True) as met:
                _rename(aside, met, name, b"%b-%b" % (secrets.token_hex(8).encode(), name[:200]))
            if aside == source:
                return
    raise PassingError(f"{shown(name)} is made again and again during the switch", next_step="stop the volume's users")


def _rename(source: int, target: int, name: bytes, new_name: bytes) -> None:
    """Rename without replacing, a folder of ours too into which we may not write. Raises `OSError`."""
    try:
        _rename_as_it_is(source, target, name, new_name)
    except PermissionError:
        # Who moves a folder changes its "..", for which only root needs no right to write (rename(2), EACCES).
        with _made_writable(source, name) as is_made:
            if not is_made:
                raise
            _rename_as_it_is(source, target, name, new_name)


@contextlib.contextmanager
def _made_writable(folder: int, name: bytes) -> Iterator[bool]:
    """While the block lasts, have a folder be writable by us, its owner; False where that is not what is missing.

    A kill in the block leaves it writable.
    """
    try:
        descriptor = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        yield False
        return
    try:
        mode = os.fstat(descriptor).st_mode
        if mode & stat.S_IWUSR or os.fstat(descriptor).st_uid != os.geteuid():
            yield False
            return
        path = f"/proc/self/fd/{descriptor}"  # of a folder that can't be read there is no other descriptor
        os.chmod(path, stat.S_IMODE(mode) | stat.S_IWUSR)
        try:
            yield True
        finally:
            os.chmod(path, stat.S_IMODE(mode))
    finally:
        os.close(descriptor)


def _rename_as_it_is(source: int, target: int, name: bytes, new_name: bytes) -> None:
    """Rename without replacing (renameat2(2)); on a file system that has no such call, a look comes before. Raises `OSError`."""
    if _LIBC.renameat2(source, name, target, new_name, _RENAME_NOREPLACE) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise OSError(code, os.strerror(code), shown(name))
    if _has(target, new_name):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), shown(name))
    os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=target)


def _take_over_attributes(new: int, root: int, staging: int) -> list[str]:
    """Owner, mode and attributes of the set's root for the live one, and no others; its time comes when all is done.

    Returns, in a sentence, what could not be set, where that is accepted.
    """
    accepts_loss = _has(staging, LOSS)
    lost: list[str] = []

    def attempt(what: str, act: Callable[..., None], *values: object, **named: object) -> None:
        try:
            act(*values, **named)
        except OSError as error:
            if not accepts_loss or error.errno not in METADATA_REFUSED | TOO_LARGE:
                raise
            lost.append(what)

    status, current = os.fstat(new), os.fstat(root)
    if (status.st_uid, status.st_gid) != (current.st_uid, current.st_gid):
        attempt("owner", os.fchown, root, status.st_uid, status.st_gid)
    wanted, present = _xattrs(new), _xattrs(root)
    for name in present.keys() - wanted.keys():
        attempt(f"the absence of {name}", os.removexattr, root, name)
    for name, value in wanted.items():
        if present.get(name) != value:
            attempt(name, os.setxattr, root, name, value)
    # Behind the ACL, whose entry for the owner was changed with `new/` when that was made ours to write into.
    mode = _root_mode(staging, new)
    if stat.S_IMODE(os.fstat(root).st_mode) != mode:
        attempt("mode", os.fchmod, root, mode)
    if accepts_loss:
        attempt("time", os.utime, root, ns=(current.st_atime_ns, _times(staging)[0]))
    return (
        [f"could not be set here: {', '.join(lost)} of the root, which belongs to uid {current.st_uid}"] if lost else []
    )


def _xattrs(folder: int) -> dict[str, bytes]:
    try:
        # Attributes of class security that differ are the system's doing (labels by policy), those set are in `new` too.
        return {name: os.getxattr(folder, name) for name in os.listxattr(folder) if name != "security.selinux"}
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise


@contextlib.contextmanager
def _locked_staging(root: Path, restore_id: str) -> Iterator[tuple[int, int | None]]:
    """Root and staging place (None: there is none), with the fence held: two processes never exchange one volume.

    The lock lies in the staging place and goes with it; whoever waited for one that is gone has nothing to do.
    """
    with opened_root(root) as descriptor, contextlib.ExitStack() as stack:
        try:
            staging = stack.enter_context(opened_folder(descriptor, staging_name(restore_id)))
            lock = os.open(LOCK, LOCK_FLAGS, 0o600, dir_fd=staging)
        except FileNotFoundError:
            yield descriptor, None
            return
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PassingError(f"another process is exchanging {root}", next_step="wait until it has ended") from None
        yield descriptor, (staging if os.fstat(staging).st_nlink else None)


def _names(folder: int) -> list[bytes]:
    return sorted(map(os.fsencode, os.listdir(folder)))


def _has(folder: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _prepare(root: int, staging: int) -> None:
    """Make all that a switch needs: its folders, its states, and the times of the root with the staged and the live entries."""
    for name in (OLD, MET):
        with opened_folder(staging, name, make=True):
            pass
    for reached in (MOVING_OUT, MOVING_IN, SWITCHED):
        _put_text(staging, reached, reached)
    new = os.stat(NEW, dir_fd=staging)
    _put_text(staging, TIME, b"%d %d" % (new.st_mtime_ns, os.fstat(root).st_mtime_ns))
    # Nothing can be moved out of a folder into which we may not write.
    mode = stat.S_IMODE(new.st_mode)
    if not _has(staging, MODE):  # an earlier call may have put it there, and changed the folder's
        _put_text(staging, MODE, b"%o" % mode)
    os.chmod(NEW, mode | stat.S_IRWXU, dir_fd=staging)


def _set_state(staging: int, reached: bytes) -> None:
    os.replace(reached, STATE, src_dir_fd=staging, dst_dir_fd=staging)
    os.fsync(staging)


def _root_mode(staging: int, new: int) -> int:
    """The mode of the set's root, which `new/` had before it was made ours to write into."""
    try:
        return int(os.readlink(MODE, dir_fd=staging), 8)
    except FileNotFoundError:  # a switch that an earlier version began
        return stat.S_IMODE(os.fstat(new).st_mode)


def _times(staging: int) -> tuple[int, int]:
    new, old = os.readlink(TIME, dir_fd=staging).split()
    return int(new), int(old)


def _put_text(staging: int, name: bytes, text: bytes) -> None:
    """Replace a text in one step. A link's text is written with its name, so it can't be there without it."""
    temporary = name + b".next"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=staging)
    os.symlink(text, temporary, dir_fd=staging)
    os.replace(temporary, name, src_dir_fd=staging, dst_dir_fd=staging)


def _sync_file_system(descriptor: int) -> None:
    if _LIBC.syncfs(descriptor) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
