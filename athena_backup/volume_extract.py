"""A volume out of the store into an empty folder, by descriptors only; mirror of `volume_archive`.

Never `extractall` ("volumes", section 4): a set may come from anywhere and a restore may run as root. Every name is resolved
below the staging folder by the kernel (openat2(2)), nothing is followed, nothing is replaced.
"""

import contextlib
import errno
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from athena_backup.crew import Crew
from athena_backup.errors import DamagedError, DeniedError, FinalError
from athena_backup.manifest import Component
from athena_backup.operation import Operation
from athena_backup.store import Store
from athena_backup.volume_entry import shown
from athena_backup.volume_folders import Folders, SymbolicLinks
from athena_backup.volume_hand import FOLDER_FLAGS, Hand, Hands, told
from athena_backup.volume_latency import Helpers
from athena_backup.volume_pax import SYMLINK, Member
from athena_backup.volume_read import Receiver, read_archives

OwnerMap = Mapping[tuple[int, int], tuple[int, int]]
"""From uid and gid in the set to uid and gid here."""

METADATA_REFUSED = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EINVAL}
"""What a file system says to owners, modes and attributes that may not be set, or that it does not have."""
TOO_LARGE = {errno.ENOSPC, errno.E2BIG, errno.ERANGE}
"""What it says to an extended attribute that is too large for it, though there is room (ext4: 4 KiB for all of an inode's)."""
_POLICYS = frozenset({"security.selinux"})
"""What the system gives every file by its policy, of which its own is right where no other may be set."""


@dataclass(frozen=True)
class RestoredVolume:
    """What was extracted. ``losses`` says in words which attributes could not be set, where that was accepted or is no harm."""

    members: int
    losses: tuple[str, ...]


def read_volume(
    component: Component,
    store: Store,
    staging: Path | int,
    operation: Operation,
    *,
    crew: Crew | None = None,
    allow_devices: bool = False,
    owner_map: OwnerMap | None = None,
    accept_metadata_loss: bool = False,
) -> RestoredVolume:
    """Extract every archive of a volume into the empty folder ``staging`` (a path or an open descriptor).

    As many archives are extracted at once as ``crew`` has slots. The folder itself gets mode, owner, attributes and time of
    the volume's root. Raises `DamagedError` unless everything that component.json promises was found, `FinalError` for a
    member that a volume can't have, `DeniedError` for attributes that may not be set here (with ``accept_metadata_loss`` they
    are left out and told), and `FullError`.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(staging, Path):
            with told(os.fsencode(staging)):
                staging = os.open(staging, FOLDER_FLAGS)
            stack.callback(os.close, staging)
        dresser = _Dresser(owner_map or {}, accepts_loss=accept_metadata_loss)
        tree = stack.enter_context(Tree(staging, dresser, operation.check, allow_devices=allow_devices))
        read_archives(component, store, operation, tree.receiving, crew)
        tree.finish()
        return RestoredVolume(members=tree.members, losses=dresser.losses())


@dataclass
class _Dresser:
    """Gives entries their attributes: owner, then mode, then xattrs, then time; each of the first can undo a later one.

    Attributes of class user come before the mode: into what is read-only by then only root may write them (xattr(7)).
    """

    owner_map: OwnerMap
    accepts_loss: bool
    _lost: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def dress(self, path: bytes, member: Member, descriptor: int) -> None:
        """Dress what is open."""
        mode = self._own(path, member, os.fstat(descriptor), os.chown, descriptor)
        own = {name: value for name, value in member.xattrs.items() if name.startswith("user.")}
        for attribute, value in own.items():
            self._set_attribute(attribute, value, path, descriptor)
        self._set("mode", path, os.chmod, descriptor, mode)
        for attribute in member.xattrs.keys() - own.keys():
            self._set_attribute(attribute, member.xattrs[attribute], path, descriptor)
        os.utime(descriptor, ns=(member.mtime_ns, member.mtime_ns))

    def dress_named(self, path: bytes, member: Member, folder: int) -> None:
        """Dress what can't be opened: a link, FIFO or device in a folder that only we write to; never followed."""
        name = path.rpartition(b"/")[2]
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        mode = self._own(path, member, status, os.chown, name, dir_fd=folder, follow_symlinks=False)
        if member.type != SYMLINK:
            self._set("mode", path, os.chmod, name, mode, dir_fd=folder)
        where = b"/proc/self/fd/%d/%b" % (folder, name)
        for attribute, value in member.xattrs.items():
            self._set_attribute(attribute, value, path, where, follow_symlinks=False)
        os.utime(name, ns=(member.mtime_ns, member.mtime_ns), dir_fd=folder, follow_symlinks=False)

    def _own(
        self,
        path: bytes,
        member: Member,
        status: os.stat_result,
        chown: Callable[..., None],
        target: int | bytes,
        **where: object,
    ) -> int:
        """Set the owner and return the mode to be set: without set-id bits where the owner is not the one they mean."""
        owner = self.owner_map.get((member.uid, member.gid), (member.uid, member.gid))
        if (status.st_uid, status.st_gid) == owner or self._set("owner", path, chown, target, *owner, **where):
            return member.mode
        return member.mode & ~(stat.S_ISUID | stat.S_ISGID)

    def _set_attribute(self, name: str, value: bytes, path: bytes, target: int | bytes, **where: object) -> None:
        """Set an extended attribute; raises `DeniedError` for one that is too large here, unless its loss is accepted."""
        try:
            self._set(name, path, os.setxattr, target, name, value, **where)
        except OSError as error:
            if error.errno not in TOO_LARGE or (error.errno == errno.ENOSPC and _is_full(target)):
                raise
            if not self.accepts_loss:
                raise DeniedError(
                    f"{shown(path) or 'the root'}: its attribute {name} of {len(value)} bytes can't be set here: {error.strerror}",
                    next_step="restore to a file system that has room for it, or set acceptMetadataLoss in the request",
                ) from None
            self._note_loss(name, path)

    def _set(self, what: str, path: bytes, act: Callable[..., None], *args: object, **where: object) -> bool:
        try:
            act(*args, **where)
        except OSError as error:
            if not (self.accepts_loss or what in _POLICYS) or error.errno not in METADATA_REFUSED:
                raise
            self._note_loss(what, path)
            return False
        return True

    def _note_loss(self, what: str, path: bytes) -> None:
        with self._lock:
            count, first = self._lost.get(what, (0, path))
            self._lost[what] = (count + 1, first)

    def losses(self) -> tuple[str, ...]:
        """What could not be set, one sentence per kind of attribute."""
        return tuple(
            f"{what} of {count} entries, the first {shown(first) or 'the root'}"
            for what, (count, first) in sorted(self._lost.items())
        )


def _is_full(target: int | bytes) -> bool:
    """Whether the file system of an entry has no room at all, for whatever it be."""
    room = os.statvfs(target if isinstance(target, int) else os.path.dirname(target))
    return room.f_bavail == 0 < room.f_blocks


class Tree:
    """The tree that grows below the staging folder. Links come after all files, folders' attributes last, deepest first."""

    def __init__(self, root: int, dresser: _Dresser, check: Callable[[], None], *, allow_devices: bool) -> None:
        self.members = 0
        self._check = check
        # Its own, and open as long as anybody makes entries: a thread that nobody waits for any more must not write where
        # the number of a descriptor that was closed leads by then.
        self.root = os.dup(root)
        self._users = 1
        self.dresser = dresser
        self.allow_devices = allow_devices
        self._symlinks = SymbolicLinks()
        self._hard_links: list[tuple[bytes, bytes]] = []
        self._folders = Folders()
        self._made_folders = 1  # the root
        self._lock = threading.Lock()

    def __enter__(self) -> "Tree":
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    @contextlib.contextmanager
    def receiving(self) -> Iterator[Receiver]:
        """What makes the entries of one archive, whatever others make meanwhile; raises where nobody makes any more."""
        with self._hands() as hands:
            yield hands.make

    @contextlib.contextmanager
    def _hands(self) -> Iterator[Hands]:
        with self._hand() as hand, Helpers(self._hand, self._check) as helpers:
            yield Hands(hand, helpers)
            helpers.finish()

    @contextlib.contextmanager
    def _hand(self) -> Iterator[Hand]:
        with self._lock:
            if not self._users:
                raise FinalError("the restore of this volume has ended")
            self._users += 1
        try:
            with Hand(self) as hand:
                yield hand
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                os.close(self.root)

    def count(self) -> None:
        """Note another entry."""
        with self._lock:
            self.members += 1

    def note_hard_link(self, path: bytes, target: bytes) -> None:
        """Note a link whose target is not there yet: another archive may bring it."""
        with self._lock:
            self._hard_links.append((path, target))

    def note_symlink(self, path: bytes, member: Member) -> None:
        """Note what is to be made when every file is there."""
        with self._lock:
            self._symlinks.add(path, member)

    def note_directory(self, path: bytes, member: Member) -> None:
        """Note what a folder is to look like in the end; raises for a second opinion."""
        with self._lock:
            self._folders.add(path, member)

    def make_folder(self, parent: int, name: bytes) -> None:
        """Make a folder in an open one, unless it is there."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
            with self._lock:
                self._made_folders += 1

    def finish(self) -> None:
        """Make the links that are left, then give every folder its attributes, the deepest first and the root last."""
        with self._hands() as hands:
            self._make_hard_links(hands.own)
            for path, member in self._symlinks:
                self._check()
                hands.do(partial(Hand.make_symlink, path=path, member=member))
        if len(self._folders) != self._made_folders:
            raise DamagedError("the archive holds entries in folders that are no members of it")
        for paths in self._folders.deepest_first():
            # Whoever may not enter a folder any more has no business below it.
            with self._hands() as hands:
                for path in paths:
                    self._check()
                    hands.do(partial(Hand.dress_folder, path=path, member=self._folders.of(path)))

    def _make_hard_links(self, hand: Hand) -> None:
        """Each as soon as its target is there, which may be such a link itself; raises `DamagedError` where one never is."""
        made: deque[bytes] = deque()
        waiting: dict[bytes, list[bytes]] = {}
        for path, target in self._hard_links:
            self._check()
            if hand.make_hard_link(path, target):
                made.append(path)
            else:
                waiting.setdefault(target, []).append(path)
        while made:
            target = made.popleft()
            for path in waiting.pop(target, ()):
                self._check()
                hand.make_hard_link(path, target)
                made.append(path)
        for target, paths in waiting.items():
            raise DamagedError(f"{shown(paths[0])} is a hard link to {shown(target)}, which is not there")
