"""The hands that make a restored tree's entries: one entry after the other, and where that is slow, several at once.

Called by `volume_extract`, whose `Tree` they work on. Every name is resolved below the tree's root by the kernel (openat2(2)),
nothing is followed, nothing is replaced ("volumes", section 4).
"""

import contextlib
import ctypes
import errno
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from athena_backup.errors import AthenaError, DeniedError, FinalError, FullError
from athena_backup.volume_entry import shown
from athena_backup.volume_latency import Helpers, Slowness, Way
from athena_backup.volume_pax import BLOCK, CHARACTER, DIRECTORY, FIFO, FILE, HARD_LINK, SYMLINK, Member
from athena_backup.volume_read import Content, checked_path

if TYPE_CHECKING:
    from athena_backup.volume_extract import Tree

_OPENAT2 = 437
_RESOLVE = 0x02 | 0x04 | 0x08  # RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH
_SMALL_BYTES = 1 << 20
"""Up to this size a file is made in one go."""
_PATH_LIMIT_BYTES = 4_095
_LIBC = ctypes.CDLL(None, use_errno=True)
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DEVICE_TYPES = {CHARACTER: stat.S_IFCHR, BLOCK: stat.S_IFBLK}


class Hands:
    """What makes entries one after the other, and where that is slow, several at once."""

    def __init__(self, own: "Hand", helpers: Helpers["Hand"]) -> None:
        self.own = own
        self._helpers = helpers
        self._slowness = Slowness()

    def make(self, path: bytes, member: Member, content: Content) -> None:
        """Make one entry, or have it made; a `Receiver`."""
        if member.type == DIRECTORY or (member.type == FILE and member.stored_bytes <= _SMALL_BYTES):
            # Read whole: neither the store's time counts as the file system's, nor need the archive wait for the entry.
            pieces = list(content)
            self.do(lambda hand: hand.make(path, member, iter(pieces)), member.stored_bytes)
        else:
            self.own.make(path, member, content)

    def do(self, work: "Callable[[Hand], None]", size_bytes: int = 0) -> None:
        """Do something that no other entry depends on; ``size_bytes``: what it keeps in memory until it is done."""
        way = self._slowness.next()
        if way is Way.HELPED and self._helpers.give(work, size_bytes):
            return
        began = time.perf_counter()
        work(self.own)
        if way is Way.TIMED:
            self._slowness.note(time.perf_counter() - began)


class Hand:
    """One of those that make entries in the tree at the same time, with the folder that it was in last."""

    def __init__(self, tree: "Tree") -> None:
        self._tree = tree
        self._cached: tuple[bytes, int] = (b"", os.dup(tree.root))

    def __enter__(self) -> "Hand":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._cached[1])

    def make(self, path: bytes, member: Member, content: Content) -> None:
        """Make one entry, symbolic links excepted, which come last; a `Receiver`."""
        self._tree.count()
        with told(path):
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
        with told(path):
            os.symlink(member.link, path.rpartition(b"/")[2], dir_fd=self._parent(path))
            self._tree.dresser.dress_named(path, member, self._parent(path))

    def dress_folder(self, path: bytes, member: Member) -> None:
        """Give a folder in which everything is made its attributes."""
        with told(path):
            descriptor = open_beneath(self._tree.root, path)
            try:
                self._tree.dresser.dress(path, member, descriptor)
            finally:
                os.close(descriptor)

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
        with contextlib.ExitStack() as stack, told(path):
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
        how = struct.pack("=QQQ", FOLDER_FLAGS, 0, _RESOLVE)
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
            below = os.open(segment, FOLDER_FLAGS, dir_fd=current)
        finally:
            os.close(current)
        current = below
    return current


def _write_at(descriptor: int, piece: bytes, offset: int) -> None:
    view = memoryview(piece)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def twice(path: bytes) -> FinalError:
    return FinalError(f"{shown(path) or 'the root'} stands twice in the archive")


@contextlib.contextmanager
def told(path: bytes) -> Iterator[None]:
    """Translate what the staging's file system says about one entry."""
    try:
        yield
    except OSError as error:
        raise _translated(path, error) from None


def _translated(path: bytes, error: OSError) -> AthenaError:
    what = f"{shown(path) or 'the root'}: {error.strerror}"
    if error.errno == errno.EEXIST:
        return twice(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return FullError(what, next_step="give the volume more room, then restore again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DeniedError(what, next_step="run the restore as a user that may set owners and write there")
    if error.errno in (errno.ELOOP, errno.EXDEV, errno.ENOTDIR):
        return FinalError(f"{shown(path)} would lead through a link or a file: the archive is hostile or damaged")
    return FinalError(what)
