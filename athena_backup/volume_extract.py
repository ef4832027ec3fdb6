"""A volume out of the store into an empty folder, by descriptors only; mirror of `volume_archive`.

Never `extractall` ("volumes", section 4): a set may come from anywhere and a restore may run as root. Every name is resolved
below the staging folder by the kernel (openat2(2)), nothing is followed, nothing is replaced.
"""

import contextlib
import ctypes
import errno
import os
import stat
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from athena_backup.crew import Crew
from athena_backup.errors import AthenaError, DamagedError, DeniedError, FinalError, FullError
from athena_backup.manifest import Component
from athena_backup.operation import Operation
from athena_backup.store import Store
from athena_backup.volume_entry import shown
from athena_backup.volume_pax import BLOCK, CHARACTER, DIRECTORY, FIFO, FILE, HARD_LINK, SYMLINK, Member
from athena_backup.volume_read import Content, Receiver, checked_path, read_archives

OwnerMap = Mapping[tuple[int, int], tuple[int, int]]
"""From uid and gid in the set to uid and gid here."""

_OPENAT2 = 437
_RESOLVE = 0x02 | 0x04 | 0x08  # RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH
_PATH_LIMIT_BYTES = 4_095
_LIBC = ctypes.CDLL(None, use_errno=True)
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DEVICE_TYPES = {CHARACTER: stat.S_IFCHR, BLOCK: stat.S_IFBLK}
_METADATA_REFUSED = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EINVAL}
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
            with _told(os.fsencode(staging)):
                staging = os.open(staging, _DIRECTORY_FLAGS)
            stack.callback(os.close, staging)
        dresser = _Dresser(owner_map or {}, accepts_loss=accept_metadata_loss)
        tree = stack.enter_context(_Tree(staging, dresser, allow_devices=allow_devices))
        read_archives(component, store, operation, tree.receiving, crew)
        tree.finish(operation)
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
            self._set(attribute, path, os.setxattr, descriptor, attribute, value)
        self._set("mode", path, os.chmod, descriptor, mode)
        for attribute in member.xattrs.keys() - own.keys():
            self._set(attribute, path, os.setxattr, descriptor, attribute, member.xattrs[attribute])
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
            self._set(attribute, path, os.setxattr, where, attribute, value, follow_symlinks=False)
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

    def _set(self, what: str, path: bytes, act: Callable[..., None], *args: object, **where: object) -> bool:
        try:
            act(*args, **where)
        except OSError as error:
            if not (self.accepts_loss or what in _POLICYS) or error.errno not in _METADATA_REFUSED:
                raise
            with self._lock:
                count, first = self._lost.get(what, (0, path))
                self._lost[what] = (count + 1, first)
            return False
        return True

    def losses(self) -> tuple[str, ...]:
        """What could not be set, one sentence per kind of attribute."""
        return tuple(
            f"{what} of {count} entries, the first {shown(first) or 'the root'}"
            for what, (count, first) in sorted(self._lost.items())
        )


class _Tree:
    """The tree that grows below the staging folder. Links come after all files, folders' attributes last, deepest first."""

    def __init__(self, root: int, dresser: _Dresser, *, allow_devices: bool) -> None:
        self.members = 0
        # Its own, and open as long as anybody makes entries: a thread that nobody waits for any more must not write where
        # the number of a descriptor that was closed leads by then.
        self.root = os.dup(root)
        self._users = 1
        self.dresser = dresser
        self.allow_devices = allow_devices
        self._symlinks: list[tuple[bytes, Member]] = []
        self._hard_links: list[tuple[bytes, bytes]] = []
        self._directories: dict[bytes, Member] = {}
        self._made_folders = 1  # the root
        self._lock = threading.Lock()

    def __enter__(self) -> "_Tree":
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    @contextlib.contextmanager
    def receiving(self) -> Iterator[Receiver]:
        """What makes the entries of one archive, whatever others make meanwhile; raises where nobody makes any more."""
        with self._lock:
            if not self._users:
                raise FinalError("the restore of this volume has ended")
            self._users += 1
        try:
            with _Hand(self) as hand:
                yield hand.make
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
            self._symlinks.append((path, member))

    def note_directory(self, path: bytes, member: Member) -> None:
        """Note what a folder is to look like in the end; raises for a second opinion."""
        with self._lock:
            if path in self._directories:
                raise _twice(path)
            self._directories[path] = member

    def make_folder(self, parent: int, name: bytes) -> None:
        """Make a folder in an open one, unless it is there."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
            with self._lock:
                self._made_folders += 1

    def finish(self, operation: Operation) -> None:
        """Make the links that are left, then give every folder its attributes, the deepest first and the root last."""
        with _Hand(self) as hand:
            self._make_hard_links(hand, operation)
            for path, member in self._symlinks:
                operation.check()
                hand.make_symlink(path, member)
        if len(self._directories) != self._made_folders:
            raise DamagedError("the archive holds entries in folders that are no members of it")
        for path in sorted(self._directories, key=lambda path: path.count(b"/") if path else -1, reverse=True):
            operation.check()
            with _told(path):
                descriptor = open_beneath(self.root, path)
                try:
                    self.dresser.dress(path, self._directories[path], descriptor)
                finally:
                    os.close(descriptor)

    def _make_hard_links(self, hand: "_Hand", operation: Operation) -> None:
        """Each as soon as its target is there, which may be such a link itself; raises `DamagedError` where one never is."""
        made: deque[bytes] = deque()
        waiting: dict[bytes, list[bytes]] = {}
        for path, target in self._hard_links:
            operation.check()
            if hand.make_hard_link(path, target):
                made.append(path)
            else:
                waiting.setdefault(target, []).append(path)
        while made:
            target = made.popleft()
            for path in waiting.pop(target, ()):
                operation.check()
                hand.make_hard_link(path, target)
                made.append(path)
        for target, paths in waiting.items():
            raise DamagedError(f"{shown(paths[0])} is a hard link to {shown(target)}, which is not there")


class _Hand:
    """One of those that make entries in the tree at the same time, with the folder that it was in last."""

    def __init__(self, tree: _Tree) -> None:
        self._tree = tree
        self._cached: tuple[bytes, int] = (b"", os.dup(tree.root))

    def __enter__(self) -> "_Hand":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._cached[1])

    def make(self, path: bytes, member: Member, content: Content) -> None:
        """Make one entry, symbolic links excepted, which come last; a `Receiver`."""
        self._tree.count()
        with _told(path):
            if member.type == DIRECTORY:
                self._directory(path, member)
            elif not path:
                raise FinalError("the archive's root is no folder")
            elif member.type == FILE:
                self._file(path, member, content)
            elif member.type == HARD_LINK:
                target = checked_path(member.link)
                if not self.make_hard_link(path, target):
                    self._tree.note_hard_link(path, target)
            elif member.type == SYMLINK:
                self._tree.note_symlink(path, member)
            else:
                self._special(path, member)

    def make_symlink(self, path: bytes, member: Member) -> None:
        """Make a symbolic link, which nobody follows any more."""
        with _told(path):
            os.symlink(member.link, path.rpartition(b"/")[2], dir_fd=self._parent(path))
            self._tree.dresser.dress_named(path, member, self._parent(path))

    def _directory(self, path: bytes, member: Member) -> None:
        self._tree.note_directory(path, member)
        if path:
            self._tree.make_folder(self._parent(path), path.rpartition(b"/")[2])

    def _file(self, path: bytes, member: Member, content: Content) -> None:
        descriptor = os.open(path.rpartition(b"/")[2], _NEW_FILE_FLAGS, 0o600, dir_fd=self._parent(path))
        try:
            for offset, piece in content:
                _write_at(descriptor, piece, offset)
            if member.is_sparse:
                os.ftruncate(descriptor, member.size_bytes)
            self._tree.dresser.dress(path, member, descriptor)
        finally:
            os.close(descriptor)

    def make_hard_link(self, path: bytes, target: bytes) -> bool:
        """Make a hard link, unless its target is not there; returns whether it was.

        The staging folder was empty: whatever regular file is in it was made by this restore.
        """
        parent, _, source = target.rpartition(b"/")
        with contextlib.ExitStack() as stack, _told(path):
            try:
                descriptor = open_beneath(self._tree.root, parent)
                stack.callback(os.close, descriptor)
                status = os.stat(source, dir_fd=descriptor, follow_symlinks=False)
            except FileNotFoundError:
                return False
            if not stat.S_ISREG(status.st_mode):
                raise FinalError(f"{shown(path)} is a hard link to something that is no plain file")
            name = path.rpartition(b"/")[2]
            os.link(source, name, src_dir_fd=descriptor, dst_dir_fd=self._parent(path), follow_symlinks=False)
            return True

    def _special(self, path: bytes, member: Member) -> None:
        folder, name = self._parent(path), path.rpartition(b"/")[2]
        if member.type == FIFO:
            os.mkfifo(name, 0o600, dir_fd=folder)
        elif self._tree.allow_devices:
            os.mknod(name, _DEVICE_TYPES[member.type] | 0o600, os.makedev(*member.device), dir_fd=folder)
        else:
            raise FinalError(
                f"{shown(path)} is a device node", next_step="allow device nodes in the restore if they are wanted"
            )
        self._tree.dresser.dress_named(path, member, folder)

    def _parent(self, path: bytes) -> int:
        """A descriptor of the folder in which ``path`` lies, made where it is missing; kept until the next one is asked for."""
        parent = path.rpartition(b"/")[0]
        if parent != self._cached[0]:
            try:
                descriptor = open_beneath(self._tree.root, parent)
            except FileNotFoundError:
                self._tree.make_folder(self._parent(parent), parent.rpartition(b"/")[2])
                descriptor = open_beneath(self._tree.root, parent)
            os.close(self._cached[1])
            self._cached = (parent, descriptor)
        return self._cached[1]


def open_beneath(root: int, path: bytes) -> int:
    """Open a folder below ``root``, the root itself for an empty path, without following anything.

    By openat2(2), or step by step where the kernel lacks it or the path is longer than it takes. Raises `OSError`.
    """
    if not path:
        return os.dup(root)
    if len(path) <= _PATH_LIMIT_BYTES:
        how = struct.pack("=QQQ", _DIRECTORY_FLAGS, 0, _RESOLVE)
        descriptor = _LIBC.syscall(
            _OPENAT2, root, ctypes.c_char_p(path), ctypes.c_char_p(how), ctypes.c_size_t(len(how))
        )
        if descriptor >= 0:
            return int(descriptor)
        code = ctypes.get_errno()
        # EPERM: what a filter of system calls says to one that it does not know (older container runtimes).
        if code not in (errno.ENOSYS, errno.EPERM):
            raise OSError(code, os.strerror(code), path)
    return _open_step_by_step(root, path)


def _open_step_by_step(root: int, path: bytes) -> int:
    current = os.dup(root)
    for segment in path.split(b"/"):
        try:
            below = os.open(segment, _DIRECTORY_FLAGS, dir_fd=current)
        finally:
            os.close(current)
        current = below
    return current


def _write_at(descriptor: int, piece: bytes, offset: int) -> None:
    view = memoryview(piece)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _twice(path: bytes) -> FinalError:
    return FinalError(f"{shown(path) or 'the root'} stands twice in the archive")


@contextlib.contextmanager
def _told(path: bytes) -> Iterator[None]:
    """Translate what the staging's file system says about one entry."""
    try:
        yield
    except OSError as error:
        raise _translated(path, error) from None


def _translated(path: bytes, error: OSError) -> AthenaError:
    what = f"{shown(path) or 'the root'}: {error.strerror}"
    if error.errno == errno.EEXIST:
        return _twice(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return FullError(what, next_step="give the volume more room, then restore again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DeniedError(what, next_step="run the restore as a user that may set owners and write there")
    if error.errno in (errno.ELOOP, errno.EXDEV, errno.ENOTDIR):
        return FinalError(f"{shown(path)} would lead through a link or a file: the archive is hostile or damaged")
    return FinalError(what)
