"""What would keep a volume from being restored, found before anything is extracted.

What the set's owners, modes and attributes ask for is really set on a probe in the staging place ("volumes", section 4):
what a file system, a mount or a container lets a process set can't be told from outside.
"""

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from athena_backup.errors import AthenaError, DeniedError, FinalError, FullError
from athena_backup.manifest import Component, VolumeFacts
from athena_backup.mounts import mounts
from athena_backup.volume_extract import OwnerMap
from athena_backup.volume_movable import entry_faults, overlay_faults, root_is_fixed
from athena_backup.volume_staging import made_staging, opened_root, told
from athena_backup.volume_walk import STAGING_PREFIX

_PROBE, _LINK = b"probe", b"probe-link"
_PROBE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Values that the kernel takes: no capability at all (linux/capability.h, revision 2); an ACL that says what the mode says
# (linux/posix_acl_xattr.h).
_NO_CAPABILITY = struct.pack("<5I", 0x02000000, 0, 0, 0, 0)
_PLAIN_ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, 0, 0xFFFFFFFF) for tag in (0x01, 0x04, 0x20))
_ATTRIBUTES = {
    "security": ("security.capability", _NO_CAPABILITY),
    "system": ("system.posix_acl_access", _PLAIN_ACL),
    "trusted": ("trusted.athena-probe", b"1"),
    "user": ("user.athena-probe", b"1"),
}

_ADVICE = "run the restore as root on a file system that has them, or set acceptMetadataLoss in its request"


def preflight_volume(
    component: Component,
    root: Path,
    restore_id: str,
    *,
    allow_devices: bool = False,
    owner_map: OwnerMap | None = None,
    accept_metadata_loss: bool = False,
) -> list[AthenaError]:
    """Everything that would keep this volume from being restored to ``root``; makes the staging place.

    The options are those of `read_volume`; with ``accept_metadata_loss`` what can't be set is no fault.
    """
    facts = component.volume
    if facts is None:
        return [FinalError("the manifest holds no facts about this volume", next_step="restore another set")]
    faults: list[AthenaError] = []
    try:
        with told(root), contextlib.ExitStack() as stack:
            if not root.is_dir():
                return [FinalError(f"{root} is no directory", next_step="mount or make it, or correct ATHENA_VOLUMES")]
            faults += [*_mount_faults(root, facts), *_room_faults(root, *_need(component))]
            if facts.devices and not allow_devices:
                advice = "set allowDevices in the restore's request if they are wanted"
                faults.append(FinalError(f"the set holds {facts.devices} device nodes", next_step=advice))
            descriptor = stack.enter_context(opened_root(root))
            if root_is_fixed(descriptor):
                advice = f"is it mounted? chattr -i -a {root} during the restore"
                return [*faults, FinalError(f"{root} is immutable or append-only (chattr)", next_step=advice)]
            faults += entry_faults(root, descriptor)
            staging = stack.enter_context(made_staging(root, restore_id))
            faults += [*overlay_faults(root, descriptor, staging), *_link_faults(root, staging)]
            if not accept_metadata_loss:
                faults += [
                    *foreign_root_faults(root, descriptor),
                    *_metadata_faults(staging, facts, owner_map or {}),
                ]
    except AthenaError as error:
        return [*faults, error]
    return faults


def foreign_root_faults(place: Path, root: int) -> list[AthenaError]:
    """A fault where the open root, which is ``place``, belongs to somebody else and nothing can be set of it. Raises `OSError`."""
    status = os.fstat(root)
    try:
        # For which one needs the same right as for its mode; this leaves all as it is.
        os.utime(root, ns=(status.st_atime_ns, status.st_mtime_ns))
    except PermissionError:
        what = f"the owner, mode and time of {place} can't be set: it belongs to uid {status.st_uid}"
        return [DeniedError(what, next_step=_ADVICE)]
    return []


def mount_points(root: Path) -> list[str]:
    """Where other file systems are mounted inside a directory, as far as we can see."""
    own = os.path.realpath(root).rstrip("/") + "/"
    with told(root):
        return [mount.place for mount in mounts() if mount.place.startswith(own)]


def _mount_faults(root: Path, facts: VolumeFacts) -> list[AthenaError]:
    inside = mount_points(root)
    if inside:
        return [FinalError(f"{', '.join(inside)} is mounted inside {root}", next_step="unmount it during the restore")]
    return [
        FinalError(
            f"{place} is another file system inside {root}, and what is in it is in no set",
            next_step="move it out of the volume during the restore",
        )
        for place in _other_file_systems(root, facts)
    ]


def _other_file_systems(root: Path, facts: VolumeFacts) -> list[str]:
    """Folders of other file systems that no list of mounts shows, as subvolumes of btrfs: at the root, and where backups met them."""
    device = os.stat(root).st_dev

    def is_other(status: os.stat_result) -> bool:
        return stat.S_ISDIR(status.st_mode) and status.st_dev != device

    found: list[Path] = []
    # One by one, and only what is found is kept: a volume's root may have a million names.
    with os.scandir(root) as items:
        for item in items:
            if item.name.startswith(STAGING_PREFIX.decode()):
                continue
            # Of a file system that tells no kinds in its listings, is_dir() looks, which may fail as any look.
            with contextlib.suppress(OSError):
                if item.is_dir(follow_symlinks=False) and is_other(item.stat(follow_symlinks=False)):
                    found.append(root / item.name)
    # A set may come from anywhere: what it names is looked at only below the root.
    for place in map(Path, facts.other_file_systems):
        if not place.is_absolute() and ".." not in place.parts:
            with contextlib.suppress(OSError):
                if is_other(os.lstat(root / place)):
                    found.append(root / place)
    return [str(place) for place in dict.fromkeys(found)]


def preflight_room(restored: Sequence[tuple[Component, Path]]) -> list[AthenaError]:
    """Where volumes that are restored at the same time share a file system that has not enough room for all of them.

    What one alone has no room for is a fault of `preflight_volume`, and no fault here.
    """
    shared: dict[int, list[tuple[Component, Path]]] = {}
    for component, root in restored:
        with contextlib.suppress(OSError):
            shared.setdefault(os.stat(root).st_dev, []).append((component, root))
    faults: list[AthenaError] = []
    for together in shared.values():
        root = together[0][1]
        if (
            len(together) > 1
            and _is_one_room([place for _, place in together])
            and not any(_room_faults(place, *_need(one)) for one, place in together)
        ):
            needs = [_need(one) for one, _ in together]
            names = ", ".join(one.name for one, _ in together)
            found = _room_faults(root, sum(need[0] for need in needs), sum(need[1] for need in needs))
            faults += [FullError(f"{names}, on one file system: {one.cause}", next_step=one.next_step) for one in found]
    return faults


def _is_one_room(roots: Sequence[Path]) -> bool:
    """Whether folders of one file system have the same room: with quotas each has its own (xfs_quota(8)).

    By what is free; while somebody writes it is not the same from one look to the next.
    """
    rooms = [os.statvfs(root) for root in roots]
    free = [room.f_bavail for room in rooms]
    return max(free) - min(free) <= max(room.f_blocks for room in rooms) // 100


def _need(component: Component) -> tuple[int, int]:
    """The bytes and the inodes that a volume takes beside what is live."""
    if component.volume is None:
        return 0, 0
    # Files with holes need less than their sizes; what the archive holds is then the better measure.
    return min(component.volume.content_bytes, component.raw_size_bytes), component.volume.members


def _room_faults(root: Path, needed_bytes: int, needed_inodes: int) -> list[AthenaError]:
    status = os.statvfs(root)
    free_bytes = status.f_bavail * status.f_frsize
    advice = "make room beside what is live, which stays until the switch"
    faults: list[AthenaError] = []
    if free_bytes < needed_bytes:
        faults.append(FullError(f"{root} has {free_bytes} bytes free, {needed_bytes} are needed", next_step=advice))
    if status.f_files > 0 and status.f_favail < needed_inodes:
        faults.append(
            FullError(f"{root} has {status.f_favail} inodes free, {needed_inodes} are needed", next_step=advice)
        )
    return faults


def _metadata_faults(staging: int, facts: VolumeFacts, owner_map: OwnerMap) -> list[AthenaError]:
    faults: list[AthenaError] = []

    def attempt(what: str, act: Callable[..., None], *values: object) -> None:
        try:
            act(*values)
        except OSError as error:
            faults.append(DeniedError(f"{what} can't be set here: {error.strerror}", next_step=_ADVICE))

    with contextlib.suppress(FileNotFoundError):
        os.unlink(_PROBE, dir_fd=staging)
    probe = os.open(_PROBE, _PROBE_FLAGS, 0o600, dir_fd=staging)
    try:
        own = os.fstat(probe)
        uids, gids = _mapped(facts, owner_map)
        for uid in sorted(uids - {own.st_uid}):
            attempt(f"the owner {uid}", os.fchown, probe, uid, -1)
        for gid in sorted(gids - {own.st_gid}):
            attempt(f"the group {gid}", os.fchown, probe, -1, gid)
        with contextlib.suppress(OSError):
            os.fchown(probe, own.st_uid, own.st_gid)
        if facts.special_modes:
            attempt("set-id and sticky bits", os.fchmod, probe, 0o7755)
            # A bit that may not be set is left out without an error (chmod(2)).
            if not faults and os.fstat(probe).st_mode & 0o7000 != 0o7000:
                faults.append(DeniedError("set-id and sticky bits can't be set here", next_step=_ADVICE))
        for kind in sorted(_ATTRIBUTES.keys() & set(facts.xattr_classes)):
            attempt(f"extended attributes of class {kind}", os.setxattr, probe, *_ATTRIBUTES[kind])
        for kind in sorted(set(facts.xattr_classes) - _ATTRIBUTES.keys()):
            faults += _class_faults(kind, probe)
    finally:
        os.close(probe)
        os.unlink(_PROBE, dir_fd=staging)
    return faults


def _class_faults(kind: str, probe: int) -> list[AthenaError]:
    """Of other attributes (system.nfs4_acl, btrfs.compression) no value is known that any file may have.

    A file system that does not know them at all says so when they are asked for (getxattr(2), ENOTSUP).
    """
    try:
        os.getxattr(probe, kind if "." in kind else f"{kind}.athena-probe")
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            what = f"extended attributes of class {kind} can't be set here: {error.strerror}"
            return [DeniedError(what, next_step=_ADVICE)]
    return []


def _link_faults(root: Path, staging: int) -> list[AthenaError]:
    """A switch keeps its state in symbolic links, which SMB shares and FAT do not have unless asked for."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_LINK, dir_fd=staging)
    try:
        os.symlink(_PROBE, _LINK, dir_fd=staging)
    except OSError as error:
        what = f"{root} takes no symbolic links, in which a restore keeps how far its switch is: {error.strerror}"
        return [FinalError(what, next_step="mount it with them (SMB: mfsymlinks), or restore to another file system")]
    os.unlink(_LINK, dir_fd=staging)
    return []


def _mapped(facts: VolumeFacts, owner_map: OwnerMap) -> tuple[set[int], set[int]]:
    """The uids and gids that have to be set once the map was applied."""
    uids = set(facts.uids) - {uid for uid, _ in owner_map} | {uid for uid, _ in owner_map.values()}
    gids = set(facts.gids) - {gid for _, gid in owner_map} | {gid for _, gid in owner_map.values()}
    return uids, gids
