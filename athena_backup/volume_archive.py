"""A volume into the store: the walk's entries as one tar archive, streamed, and what a restore must find again.

Today a volume is one archive, ``0000.tar.zst``; the names and the extractor already allow several.
"""

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from athena_backup.errors import FinalError
from athena_backup.manifest import Component, Stream, VolumeFacts, component_folder
from athena_backup.names import SetId, new_attempt
from athena_backup.operation import Operation
from athena_backup.pipeline import PART_LIMIT_BYTES, Source, write_stream
from athena_backup.store import Store
from athena_backup.volume_pax import END, HARD_LINK, Member, header, member_of, padding, sparse_map
from athena_backup.volume_walk import Entry, Walk, open_entry, shown, unreadable

TORN_LIMIT = 0.01
"""Share of a volume's files that may change or vanish while they are read."""
_REREAD_LIMIT_BYTES = 8 << 20
"""A file up to this size is read into memory, so that it can be read again if it changed; a larger one is torn at once."""
_READS = 3
_CHUNK_BYTES = 1 << 20
_GATHER_BYTES = 256 << 10
_SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX


@dataclass(frozen=True)
class Volume:
    """A volume that is a component: its name, and the directory that it is."""

    name: str
    directory: Path


def write_volume(
    volume: Volume,
    store: Store,
    set_id: SetId,
    run_id: str,
    operation: Operation,
    *,
    torn_limit: float = TORN_LIMIT,
    allow_empty: bool = False,
    part_limit_bytes: int = PART_LIMIT_BYTES,
) -> Component:
    """Archive a volume into a new attempt's folder and return its complete `Component`; component.json is the caller's.

    Raises `FinalError` for a directory that is not there or (unless ``allow_empty``) empty, as an unmounted one is; for an
    entry that can't be read; and where more than ``torn_limit`` of the files changed or vanished while being read.
    """
    began = datetime.now(UTC)
    attempt = new_attempt()
    folder = component_folder(set_id, "volume", volume.name, attempt)
    archive = _Archive(volume, torn_limit, allow_empty=allow_empty)
    name = "0000.tar.zst"
    parts = write_stream(
        Source(volume.name, archive.chunks),
        store,
        lambda number: f"{folder}{name}.{number:04}",
        operation,
        part_limit_bytes=part_limit_bytes,
    )
    return Component(
        name=volume.name,
        kind="volume",
        attempt=attempt,
        run_id=run_id,
        state="complete",
        began=began,
        ended=datetime.now(UTC),
        streams=(Stream(name=name, parts=parts),),
        volume=archive.facts(),
    )


@dataclass
class _Archive:
    """One pass over a volume as a `Source`; `facts` are known when its chunks have ended."""

    volume: Volume
    torn_limit: float
    allow_empty: bool
    members: int = 0
    files: int = 0
    content_bytes: int = 0
    devices: int = 0
    special_modes: bool = False
    torn: list[str] = field(default_factory=list)
    uids: set[int] = field(default_factory=set)
    gids: set[int] = field(default_factory=set)
    xattr_classes: set[str] = field(default_factory=set)
    links: dict[tuple[int, int], bytes] = field(default_factory=dict)
    walk: Walk | None = None

    def chunks(self, operation: Operation) -> Iterator[bytes]:
        """The archive's bytes, gathered into pieces worth handing on; ends only if the walk ended whole."""
        self.walk = Walk(self.volume.directory, operation)
        gathered = bytearray()
        for piece in self._pieces(self.walk):
            gathered += piece
            if len(gathered) >= _GATHER_BYTES:
                yield bytes(gathered)
                gathered.clear()
        self._judge(self.walk)
        yield bytes(gathered) + END

    def _pieces(self, walk: Walk) -> Iterator[bytes]:
        for entry in walk.entries():
            walk.operation.check()
            if stat.S_ISREG(entry.status.st_mode):
                yield from self._file(walk, entry)
            else:
                yield from self._other(walk, entry)

    def _judge(self, walk: Walk) -> None:
        if self.members <= 1 and not self.allow_empty:
            raise FinalError(
                f"{self.volume.directory} is empty: is it mounted?",
                next_step="mount it; a volume that may be empty is named in ATHENA_EMPTY_VOLUMES",
            )
        lost = len(self.torn) + len(walk.vanished)
        if lost > self.torn_limit * max(1, self.files + len(walk.vanished)):
            names = ", ".join([*self.torn, *walk.vanished][:5])
            raise FinalError(
                f"{lost} of {self.files + len(walk.vanished)} files changed or vanished while they were read: {names}",
                next_step="back up when less is written, or raise ATHENA_TORN_LIMIT",
            )

    def facts(self) -> VolumeFacts:
        """What a restore must find again."""
        walk = self.walk or Walk(self.volume.directory, Operation())
        return VolumeFacts(
            members=self.members,
            files=self.files,
            content_bytes=self.content_bytes,
            torn=tuple(self.torn),
            vanished=tuple(walk.vanished),
            sockets=walk.sockets,
            other_file_systems=tuple(walk.other_file_systems),
            alternates=tuple(walk.alternates),
            uids=tuple(sorted(self.uids)),
            gids=tuple(sorted(self.gids)),
            special_modes=self.special_modes,
            devices=self.devices,
            xattr_classes=tuple(sorted(self.xattr_classes)),
        )

    def _count(self, member: Member) -> None:
        self.members += 1
        self.uids.add(member.uid)
        self.gids.add(member.gid)
        self.special_modes |= bool(member.mode & _SPECIAL_BITS)
        self.xattr_classes.update(name.partition(".")[0] for name in member.xattrs)

    def _other(self, walk: Walk, entry: Entry) -> Iterator[bytes]:
        """A directory, symbolic link, FIFO or device: a header only."""
        link = b""
        try:
            if stat.S_ISLNK(entry.status.st_mode):
                link = os.readlink(entry.name, dir_fd=entry.folder)
            xattrs = _xattrs(f"/proc/self/fd/{entry.folder}/".encode() + (b"" if entry.path == b"." else entry.name))
        except FileNotFoundError:
            walk.missing.add(entry.path)
            walk.vanished.append(shown(entry.path))
            return
        except OSError as error:
            raise unreadable(entry.path, error) from None
        member = member_of(entry.path, entry.status, link=link, xattrs=xattrs)
        self.devices += stat.S_ISBLK(entry.status.st_mode) or stat.S_ISCHR(entry.status.st_mode)
        self._count(member)
        yield header(member)

    def _file(self, walk: Walk, entry: Entry) -> Iterator[bytes]:
        inode = (entry.status.st_dev, entry.status.st_ino)
        first = self.links.get(inode) if entry.status.st_nlink > 1 else None
        if first is not None:
            member = member_of(entry.path, entry.status, link=first)
            member = replace(member, type=HARD_LINK, size_bytes=0, stored_bytes=0)
            self._count(member)
            yield header(member)
            return
        descriptor = open_entry(entry)
        if descriptor is None:
            walk.missing.add(entry.path)
            walk.vanished.append(shown(entry.path))
            return
        try:
            yield from self._content(entry, descriptor)
        except OSError as error:
            raise unreadable(entry.path, error) from None
        finally:
            os.close(descriptor)
        if entry.status.st_nlink > 1:
            self.links[inode] = entry.path

    def _content(self, entry: Entry, descriptor: int) -> Iterator[bytes]:
        before = os.fstat(descriptor)
        xattrs = _xattrs(descriptor)
        if before.st_size <= _REREAD_LIMIT_BYTES and not _has_holes(before):
            for _ in range(_READS):
                content = _read_all(descriptor, before.st_size)
                after = os.fstat(descriptor)
                if _same(before, after) and len(content) == after.st_size:
                    break
                before = after
            else:
                self.torn.append(shown(entry.path))
                content = content[: before.st_size].ljust(before.st_size, b"\0")
            yield self._counted_file(member_of(entry.path, before, xattrs=xattrs))
            yield content
            yield padding(len(content))
            return
        yield from self._large(entry, descriptor, before, xattrs)

    def _large(
        self, entry: Entry, descriptor: int, before: os.stat_result, xattrs: Mapping[str, bytes]
    ) -> Iterator[bytes]:
        """A file that is handed on as it is read: cut or padded to the size in its header if that changes meanwhile."""
        segments = _segments(descriptor, before.st_size) if _has_holes(before) else [(0, before.st_size)]
        member = member_of(entry.path, before, xattrs=xattrs)
        if segments != [(0, before.st_size)]:
            data_bytes = sum(length for _, length in segments)
            mapped = sparse_map(segments)
            member = replace(member, is_sparse=True, stored_bytes=len(mapped) + data_bytes)
            yield self._counted_file(member)
            yield mapped
        else:
            data_bytes = before.st_size
            yield self._counted_file(member)
        is_short = False
        for start, length in segments:
            position, end = start, start + length
            while position < end:
                chunk = os.pread(descriptor, min(_CHUNK_BYTES, end - position), position)
                if not chunk:
                    is_short = True
                    chunk = b"\0" * min(_CHUNK_BYTES, end - position)
                position += len(chunk)
                yield chunk
        yield padding(data_bytes)
        if is_short or not _same(before, os.fstat(descriptor)):
            self.torn.append(shown(entry.path))

    def _counted_file(self, member: Member) -> bytes:
        self._count(member)
        self.files += 1
        self.content_bytes += member.size_bytes
        return header(member)


def _same(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_size, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )


def _has_holes(status: os.stat_result) -> bool:
    return status.st_blocks * 512 < status.st_size and status.st_size > 0


def _read_all(descriptor: int, size_bytes: int) -> bytes:
    """The file's content, one byte beyond ``size_bytes`` at most, so that growth is seen."""
    content = os.pread(descriptor, size_bytes + 1, 0)
    while 0 < len(content) <= size_bytes and (
        more := os.pread(descriptor, size_bytes + 1 - len(content), len(content))
    ):
        content += more
    return content


def _segments(descriptor: int, size_bytes: int) -> list[tuple[int, int]]:
    """Where a file has data (lseek(2), SEEK_DATA and SEEK_HOLE); an empty last one carries the size behind a hole."""
    segments: list[tuple[int, int]] = []
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError:  # ENXIO: no data behind this position
            break
        end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size_bytes)
        if start >= size_bytes:
            break
        segments.append((start, end - start))
        position = end
    if not segments or sum(segments[-1]) < size_bytes:
        segments.append((size_bytes, 0))
    return segments


def _xattrs(where: int | bytes) -> dict[str, bytes]:
    """All extended attributes; none where the file system has none."""
    follow = isinstance(where, int)
    try:
        names = os.listxattr(where, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise
    return {name: os.getxattr(where, name, follow_symlinks=follow) for name in names}
