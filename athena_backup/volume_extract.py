"""A volume out of the store: the archive read as hostile, verified to its end, extracted by descriptors only.

Never `extractall` ("volumes", section 4): a set may come from anywhere and a restore may run as root. Every name is resolved
below the staging folder by the kernel (openat2(2)), nothing is followed, nothing is replaced, and what the archive holds is
bounded by what the manifest promises.
"""

import contextlib
import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from athena_backup.errors import DamagedError, DeniedError, FinalError, FullError
from athena_backup.manifest import Component, VolumeFacts
from athena_backup.operation import Operation
from athena_backup.pipeline import read_stream
from athena_backup.store import Store
from athena_backup.volume_pax import (
    BLOCK,
    BLOCK_BYTES,
    CHARACTER,
    DIRECTORY,
    EXTENDED_LIMIT_BYTES,
    FIFO,
    FILE,
    HARD_LINK,
    SYMLINK,
    Member,
    is_extended,
    read_header,
    read_member,
    read_records,
)
from athena_backup.volume_walk import shown

_OPENAT2 = 437
_RESOLVE = 0x02 | 0x04 | 0x08  # RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH
_LIBC = ctypes.CDLL(None, use_errno=True)
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SEGMENT_LIMIT = 1 << 20


def extract_volume(component: Component, store: Store, staging: int, operation: Operation) -> None:
    """Extract every archive of a volume into the empty folder behind the descriptor ``staging``.

    The staging folder itself gets mode, owner and time of the volume's root. Raises `DamagedError` unless everything that
    component.json promises was found, `FinalError` for a member that a volume can't have, `DeniedError` and `FullError`.
    """
    tree = _Tree(staging)
    _read(component, store, operation, tree)
    tree.finish()


def verify_volume(component: Component, store: Store, operation: Operation) -> None:
    """Read every archive of a volume to its verified end without extracting it; raises like `extract_volume`."""
    _read(component, store, operation, None)


def _read(component: Component, store: Store, operation: Operation, tree: "_Tree | None") -> None:
    if component.volume is None:
        raise DamagedError("the manifest holds no facts about this volume", component=component.name)
    counted = _Counted(component.volume)
    for stream in component.streams:
        archive = _Archive(read_stream(component.name, stream.parts, store, operation))
        for member in archive.members():
            operation.check()
            counted.add(member)
            content = archive.content(member)
            if tree is None:
                for _ in content:
                    pass
            else:
                tree.make(member, content)
        archive.check_end()
    counted.check()


@dataclass
class _Counted:
    """Pair of the writer's counting: the archive may never hold more, and at its end not less, than was promised."""

    promised: VolumeFacts
    members: int = 0
    files: int = 0
    content_bytes: int = 0

    def add(self, member: Member) -> None:
        self.members += 1
        if member.type == FILE:
            self.files += 1
            self.content_bytes += member.size_bytes
        promised = self.promised
        if (
            self.members > promised.members
            or self.files > promised.files
            or self.content_bytes > promised.content_bytes
        ):
            raise DamagedError(f"the archive holds more than the manifest promises, from {shown(member.name)} on")

    def check(self) -> None:
        promised = self.promised
        found = (self.members, self.files, self.content_bytes)
        if found != (promised.members, promised.files, promised.content_bytes):
            raise DamagedError(
                f"the archives hold {self.members} members, {self.files} files and {self.content_bytes} bytes; the manifest"
                f" promises {promised.members}, {promised.files} and {promised.content_bytes}"
            )


class _Archive:
    """One tar archive, read forwards."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = bytearray()
        self._pending = 0
        """Bytes of the present member's content and padding that nobody has read yet."""

    def members(self) -> Iterator[Member]:
        records: dict[str, bytes] = {}
        while True:
            if self._pending:
                raise RuntimeError("a member's content was not read")
            block = self._take(BLOCK_BYTES)
            if block == b"\0" * BLOCK_BYTES:
                if records or self._take(BLOCK_BYTES) != b"\0" * BLOCK_BYTES:
                    raise DamagedError("the archive does not end with two zero blocks")
                return
            kind, size_bytes, _ = read_header(block)
            if is_extended(kind):
                if records or size_bytes > EXTENDED_LIMIT_BYTES:
                    raise DamagedError("the archive holds an extended header that is too large, or two in a row")
                records = read_records(self._take(size_bytes + -size_bytes % BLOCK_BYTES)[:size_bytes])
                continue
            member = read_member(block, records)
            if member.type != FILE and member.stored_bytes:
                raise DamagedError(f"{shown(member.name)} has content, which its type can't have")
            records = {}
            self._pending = member.stored_bytes + -member.stored_bytes % BLOCK_BYTES
            yield member

    def content(self, member: Member) -> Iterator[tuple[int, bytes]]:
        """The pieces of a member's content with their offsets; holes of a sparse file are left out."""
        if member.is_sparse:
            yield from self._sparse(member)
        else:
            yield from self._pieces(0, member.stored_bytes)
        if self._pending:
            self._take(self._pending)
            self._pending = 0

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, bytes]]:
        while length:
            if not self._buffer:
                self._fill()
            piece = bytes(self._buffer[:length])
            del self._buffer[: len(piece)]
            self._pending -= len(piece)
            yield offset, piece
            offset += len(piece)
            length -= len(piece)

    def _sparse(self, member: Member) -> Iterator[tuple[int, bytes]]:
        text = bytearray()
        numbers: list[int] = []
        while not numbers or len(numbers) < 1 + 2 * numbers[0]:
            if self._pending < BLOCK_BYTES or len(numbers) > 2 * _SEGMENT_LIMIT:
                raise DamagedError(f"{shown(member.name)} has a broken map of its holes")
            text += self._take(BLOCK_BYTES)
            self._pending -= BLOCK_BYTES
            *lines, rest = bytes(text).split(b"\n")
            text = bytearray(rest)
            for line in lines:
                if numbers and len(numbers) == 1 + 2 * numbers[0]:
                    break
                if not line.isdigit():
                    raise DamagedError(f"{shown(member.name)} has a broken map of its holes")
                numbers.append(int(line))
        position, data_bytes = 0, member.stored_bytes
        for offset, length in zip(numbers[1::2], numbers[2::2], strict=True):
            if offset < position or offset + length > member.size_bytes or length > data_bytes:
                raise DamagedError(f"{shown(member.name)} has a broken map of its holes")
            yield from self._pieces(offset, length)
            position, data_bytes = offset + length, data_bytes - length

    def check_end(self) -> None:
        """Read the stream to its verified end; nothing may follow the two zero blocks."""
        if self._buffer or any(self._chunks):
            raise DamagedError("the archive goes on behind its end")

    def _take(self, length: int) -> bytes:
        while len(self._buffer) < length:
            self._fill()
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken

    def _fill(self) -> None:
        chunk = next(self._chunks, None)
        if chunk is None:
            raise DamagedError("the archive ends in the middle")
        self._buffer += chunk


@dataclass
class _Tree:
    """The tree that grows below the staging folder. Links come after all files, folders' attributes last, deepest first."""

    root: int
    symlinks: list[Member] = field(default_factory=list)
    directories: dict[bytes, Member] = field(default_factory=dict)

    def make(self, member: Member, content: Iterator[tuple[int, bytes]]) -> None:
        path = _checked(member.name)
        with _told(path):
            match member.type:
                case t if t == FILE:
                    self._file(path, member, content)
                case t if t == HARD_LINK:
                    self._hard_link(path, _checked(member.link))
                case t if t == SYMLINK:
                    self.symlinks.append(member)
                case t if t == DIRECTORY:
                    if path in self.directories:
                        raise FinalError(f"{shown(path)} stands twice in the archive")
                    self.directories[path] = member
                    if path:
                        with self._parent(path) as (folder, name), contextlib.suppress(FileExistsError):
                            os.mkdir(name, 0o700, dir_fd=folder)
                case t if t == FIFO:
                    with self._parent(path) as (folder, name):
                        os.mkfifo(name, 0o600, dir_fd=folder)
                        _dress_by_name(folder, name, member)
                case t if t in (CHARACTER, BLOCK):
                    raise FinalError(f"{shown(path)} is a device node, which a volume's restore does not make")
                case _:
                    raise DamagedError(f"{shown(path)} is of an unknown type {member.type!r}")
        for _ in content:  # of members that have none; reads the padding
            pass

    def finish(self) -> None:
        """Make the symbolic links, then give every folder its attributes, the deepest first and the root last."""
        for link in self.symlinks:
            path = _checked(link.name)
            with _told(path), self._parent(path) as (folder, name):
                os.symlink(link.link, name, dir_fd=folder)
                _dress_by_name(folder, name, link)
        for path in sorted(self.directories, key=lambda path: path.count(b"/") if path else -1, reverse=True):
            with _told(path):
                descriptor = _open_beneath(self.root, path) if path else os.dup(self.root)
                try:
                    _dress(descriptor, self.directories[path])
                finally:
                    os.close(descriptor)

    def _file(self, path: bytes, member: Member, content: Iterator[tuple[int, bytes]]) -> None:
        with self._parent(path) as (folder, name):
            descriptor = os.open(name, _NEW_FILE_FLAGS, 0o600, dir_fd=folder)
        try:
            for offset, piece in content:
                view = memoryview(piece)
                while view:
                    written = os.pwrite(descriptor, view, offset)
                    view, offset = view[written:], offset + written  # noqa: PLW2901 - how far this piece has come
            if member.is_sparse:
                os.ftruncate(descriptor, member.size_bytes)
            _dress(descriptor, member)
        finally:
            os.close(descriptor)

    def _hard_link(self, path: bytes, target: bytes) -> None:
        with self._parent(target) as (source_folder, source), self._parent(path) as (folder, name):
            status = os.stat(source, dir_fd=source_folder, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise FinalError(f"{shown(path)} is a hard link to something that is no plain file")
            os.link(source, name, src_dir_fd=source_folder, dst_dir_fd=folder, follow_symlinks=False)

    @contextlib.contextmanager
    def _parent(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """The open folder in which ``path`` lies, made where it is missing, and the last segment."""
        parent, _, name = path.rpartition(b"/")
        if not name:
            raise FinalError("the archive holds a member without a name")
        try:
            descriptor = _open_beneath(self.root, parent) if parent else os.dup(self.root)
        except FileNotFoundError:
            self._make_parents(parent)
            descriptor = _open_beneath(self.root, parent)
        try:
            yield descriptor, name
        finally:
            os.close(descriptor)

    def _make_parents(self, path: bytes) -> None:
        segments = path.split(b"/")
        for depth in range(1, len(segments) + 1):
            with self._parent(b"/".join(segments[:depth])) as (folder, name), contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=folder)


def _checked(name: bytes) -> bytes:
    """A member's name as a path below the staging folder, empty for the root; raises `FinalError` for a hostile one."""
    path = name.removesuffix(b"/")
    if path in (b".", b"./"):
        return b""
    segments = path.split(b"/")
    if not path or b"\0" in path or any(segment in (b"", b".", b"..") for segment in segments):
        raise FinalError(f"the archive holds the name {shown(name)!r}, which could lead out of the volume")
    return path


def _open_beneath(root: int, path: bytes) -> int:
    """Open a folder below ``root`` without following anything: by openat2(2), or step by step where the kernel lacks it."""
    how = struct.pack("=QQQ", _DIRECTORY_FLAGS, 0, _RESOLVE)
    descriptor = _LIBC.syscall(_OPENAT2, root, ctypes.c_char_p(path), ctypes.c_char_p(how), ctypes.c_size_t(len(how)))
    if descriptor >= 0:
        return int(descriptor)
    code = ctypes.get_errno()
    if code not in (errno.ENOSYS, errno.EPERM):
        raise OSError(code, os.strerror(code), path)
    current = os.dup(root)
    for segment in path.split(b"/"):
        try:
            below = os.open(segment, _DIRECTORY_FLAGS, dir_fd=current)
        finally:
            os.close(current)
        current = below
    return current


def _dress(descriptor: int, member: Member) -> None:
    """Owner, then mode, then xattrs, then time: each of the first can undo a later one."""
    status = os.fstat(descriptor)
    if (status.st_uid, status.st_gid) != (member.uid, member.gid):
        os.fchown(descriptor, member.uid, member.gid)
    os.fchmod(descriptor, member.mode)
    for name, value in member.xattrs.items():
        os.setxattr(descriptor, name, value)
    os.utime(descriptor, ns=(member.mtime_ns, member.mtime_ns))


def _dress_by_name(folder: int, name: bytes, member: Member) -> None:
    """The same for what can't be opened: a link or FIFO in a folder that only we write to, never followed."""
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if (status.st_uid, status.st_gid) != (member.uid, member.gid):
        os.chown(name, member.uid, member.gid, dir_fd=folder, follow_symlinks=False)
    if member.type == FIFO:
        os.chmod(name, member.mode, dir_fd=folder)
    for attribute, value in member.xattrs.items():
        os.setxattr(f"/proc/self/fd/{folder}/".encode() + name, attribute, value, follow_symlinks=False)
    os.utime(name, ns=(member.mtime_ns, member.mtime_ns), dir_fd=folder, follow_symlinks=False)


@contextlib.contextmanager
def _told(path: bytes) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"{shown(path) or 'the root'}: {error.strerror}"
        if error.errno == errno.EEXIST:
            raise FinalError(f"{shown(path)} stands twice in the archive") from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FullError(what, next_step="give the volume more room, then restore again") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DeniedError(what, next_step="run the restore as a user that may set owners and write there") from None
        if error.errno in (errno.ELOOP, errno.EXDEV, errno.ENOTDIR):
            raise FinalError(
                f"{shown(path)} would lead through a link or a file: the archive is hostile or damaged"
            ) from None
        raise FinalError(what) from None
