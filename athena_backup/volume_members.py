"""An entry of a live tree as the bytes of a tar member, and what a restore must find again, counted on the way.

Called by `volume_archive`, which says which entries make an archive. A file that changes while it is read is read again or
listed as torn ("volumes", section 1); the headers themselves are `volume_pax`.
"""

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from athena_backup.pipeline import FRAME_BYTES
from athena_backup.volume_entry import Entry, open_entry, reading, shown
from athena_backup.volume_pax import HARD_LINK, SEGMENT_LIMIT, Member, header, member_of, padding, sparse_map

REREAD_LIMIT_BYTES = 8 << 20
"""A file up to this size is read into memory, so that it can be read again if it changed; a larger one is torn at once."""
_READS = 3
_CHUNK_BYTES = FRAME_BYTES  # so that a frame is made of one read, without a copy
_COMPLETE_LIMIT = 100_000
"""Inodes of which every name was met that are remembered all the same: of millions all would take a gigabyte."""
_SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX

_Segments = Sequence[tuple[int, int]]
"""Offset and length of each piece of data in a file; between them are holes."""


@dataclass
class Members:
    """The members of one archive, made one after the other; the counts are whole when the last one is read."""

    note_vanished: Callable[[Entry], None]
    """Told of an entry that is gone when it is to be read."""
    count: int = 0
    files: int = 0
    content_bytes: int = 0
    devices: int = 0
    special_modes: bool = False
    torn: list[str] = field(default_factory=list)
    uids: set[int] = field(default_factory=set)
    gids: set[int] = field(default_factory=set)
    xattr_classes: set[str] = field(default_factory=set)
    links: dict[tuple[int, int], tuple[bytes, int, int, int]] = field(default_factory=dict)
    """Of inodes with several names: the first one, the size and time that it had, and how many are to come.

    Those of which none is to come are kept for a while only: a name that is made, or moved, during the walk may yet be met.
    """
    _complete: deque[tuple[int, int]] = field(default_factory=deque)

    def pieces(self, entry: Entry) -> Iterator[bytes]:
        """The bytes of one entry's member, none if it is gone; raises `FinalError` if it can't be read."""
        with reading(entry.path):
            if stat.S_ISREG(entry.status.st_mode):
                yield from self._file(entry)
            else:
                yield from self._other(entry)

    def folder(self, path: bytes, status: os.stat_result, xattrs: Mapping[str, bytes]) -> bytes:
        """The bytes of a folder's member, of one that can't be looked at any more."""
        return self._counted(member_of(path, status, xattrs=xattrs))

    def _counted(self, member: Member) -> bytes:
        """The header of a member that is now part of the archive."""
        self.count += 1
        self.uids.add(member.uid)
        self.gids.add(member.gid)
        self.special_modes |= bool(member.mode & _SPECIAL_BITS)
        self.xattr_classes.update(_class_of(name) for name in member.xattrs if name != "security.selinux")
        return header(member)

    def _other(self, entry: Entry) -> Iterator[bytes]:
        """A directory, symbolic link, FIFO or device: a header only."""
        link, xattrs, mode = b"", {}, entry.status.st_mode
        if stat.S_ISDIR(mode):
            # One without a descriptor is a mount point, whose attributes are another file system's.
            xattrs = xattrs_of(entry.opened) if entry.opened is not None else {}
        else:
            try:
                link = os.readlink(entry.name, dir_fd=entry.folder) if stat.S_ISLNK(mode) else b""
                xattrs = xattrs_of(b"/proc/self/fd/%d/%b" % (entry.folder, entry.name))
            except OSError as error:
                # EINVAL: something else took the link's place (readlink(2)).
                if error.errno not in (errno.ENOENT, errno.EINVAL):
                    raise
                self.note_vanished(entry)
                return
        self.devices += stat.S_ISBLK(mode) or stat.S_ISCHR(mode)
        yield self._counted(member_of(entry.path, entry.status, link=link, xattrs=xattrs))

    def _file(self, entry: Entry) -> Iterator[bytes]:
        opened = open_entry(entry)
        if opened is None:
            self.note_vanished(entry)
            return
        descriptor, status = opened
        try:
            if status.st_nlink > 1:
                inode = (status.st_dev, status.st_ino)
                first = self.links.get(inode)
                # A deleted file's inode is given to the next one: the number alone does not make it the same file.
                if first is not None and first[1:3] == (status.st_size, status.st_mtime_ns):
                    self._count_down(inode, first)
                    member = member_of(entry.path, status, link=first[0])
                    yield self._counted(replace(member, type=HARD_LINK, size_bytes=0, stored_bytes=0))
                    return
                if first is not None and not entry.is_object:
                    # Changed since its first name was read: it comes back as two files.
                    self.torn.append(shown(entry.path))
                self.links[inode] = (entry.path, status.st_size, status.st_mtime_ns, status.st_nlink - 1)
            yield from self._content(entry, descriptor, status)
        finally:
            os.close(descriptor)

    def _count_down(self, inode: tuple[int, int], first: tuple[bytes, int, int, int]) -> None:
        """Note that one more name of an inode was met."""
        self.links[inode] = (*first[:3], first[3] - 1)
        if first[3] == 1:
            self._complete.append(inode)
            if len(self._complete) > _COMPLETE_LIMIT:
                oldest = self._complete.popleft()
                # Its number may have become another file's, of which names are to come.
                if oldest in self.links and self.links[oldest][3] <= 0:
                    del self.links[oldest]

    def _content(self, entry: Entry, descriptor: int, status: os.stat_result) -> Iterator[bytes]:
        for _ in range(_READS):
            before = status
            # Each time anew: an ACL that is changed meanwhile goes with the mode that it makes.
            xattrs = xattrs_of(descriptor)
            if before.st_size > REREAD_LIMIT_BYTES:
                yield from self._large(entry, descriptor, before, xattrs)
                return
            content = _read_all(descriptor, before.st_size)
            segments = _segments(descriptor, before)
            status = os.fstat(descriptor)
            if _is_unchanged(entry, before, status) and len(content) == before.st_size:
                break
        else:
            self.torn.append(shown(entry.path))
            content = content[: before.st_size].ljust(before.st_size, b"\0")
        data = content if segments is None else b"".join(content[start : start + size] for start, size in segments)
        # In one piece: of small files each costs more time than copying it.
        yield b"".join((*self._file_header(entry, before, segments, xattrs), data, padding(len(data))))

    def _large(
        self, entry: Entry, descriptor: int, before: os.stat_result, xattrs: Mapping[str, bytes]
    ) -> Iterator[bytes]:
        """A file that is handed on as it is read: cut or padded to the size in its header if that changes meanwhile."""
        segments = _segments(descriptor, before)
        yield from self._file_header(entry, before, segments, xattrs)
        is_short = False
        data_bytes = 0
        for start, length in segments or [(0, before.st_size)]:
            data_bytes += length
            position, end = start, start + length
            while position < end:
                chunk = os.pread(descriptor, min(_CHUNK_BYTES, end - position), position)
                if not chunk:
                    is_short = True
                    chunk = b"\0" * min(_CHUNK_BYTES, end - position)
                position += len(chunk)
                yield chunk
        yield padding(data_bytes)
        if is_short or not _is_unchanged(entry, before, os.fstat(descriptor)):
            self.torn.append(shown(entry.path))

    def _file_header(
        self, entry: Entry, status: os.stat_result, segments: _Segments | None, xattrs: Mapping[str, bytes]
    ) -> Iterator[bytes]:
        member = member_of(entry.path, status, xattrs=xattrs)
        self.files += 1
        self.content_bytes += member.size_bytes
        if segments is None:
            yield self._counted(member)
            return
        mapped = sparse_map(segments)
        stored_bytes = len(mapped) + sum(length for _, length in segments)
        yield self._counted(replace(member, is_sparse=True, stored_bytes=stored_bytes))
        yield mapped


def _class_of(attribute: str) -> str:
    """What has to be tried before a restore, to know whether it may be set: its class, which is one thing but for system."""
    kind = attribute.partition(".")[0]
    return attribute if kind == "system" and not attribute.startswith("system.posix_acl_") else kind


def _is_unchanged(entry: Entry, before: os.stat_result, after: os.stat_result) -> bool:
    if entry.is_object:
        # Git touches a pack to say that it is in use, and unlinks one that we are reading; its bytes stay what they are.
        return before.st_size == after.st_size
    return (before.st_size, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )


def _read_all(descriptor: int, size_bytes: int) -> bytes:
    """The file's content, one byte beyond ``size_bytes`` at most, so that growth is seen."""
    content = os.pread(descriptor, size_bytes + 1, 0)
    while 0 < len(content) < size_bytes and (more := os.pread(descriptor, size_bytes + 1 - len(content), len(content))):
        content += more
    return content


def _segments(descriptor: int, status: os.stat_result) -> _Segments | None:
    """Where a file with holes has data (lseek(2), SEEK_DATA and SEEK_HOLE); None for one without.

    The last piece ends at the file's size, empty if the file ends with a hole.
    """
    size_bytes = status.st_size
    if status.st_blocks * 512 >= size_bytes:
        return None
    segments: list[tuple[int, int]] = []
    position = 0
    try:
        while position < size_bytes and len(segments) < SEGMENT_LIMIT - 2:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            if start >= size_bytes:
                break
            position = min(os.lseek(descriptor, start, os.SEEK_HOLE), size_bytes)
            segments.append((start, position - start))
        else:
            if position < size_bytes:
                segments.append((position, size_bytes - position))
    except OSError as error:
        if error.errno == errno.EINVAL:  # a file system that can't tell
            return None
        if error.errno != errno.ENXIO:  # ENXIO: no data behind this position
            raise
    if not segments or sum(segments[-1]) < size_bytes:
        segments.append((size_bytes, 0))
    return None if segments == [(0, size_bytes)] else segments


def xattrs_of(where: int | bytes) -> dict[str, bytes]:
    """All extended attributes; none where the file system has none. One that goes meanwhile is left out."""
    follow = isinstance(where, int)
    try:
        names = os.listxattr(where, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise
    found = {}
    for name in names:
        try:
            found[name] = os.getxattr(where, name, follow_symlinks=follow)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
    return found
