"""Archives out of the store, read as hostile: member by member, verified to the end, bounded by what the manifest promises.

Several archives of a volume are read at once. What is done with a member is the receiver's business (`volume_extract` makes
it; verifying only reads on). Rules: "volumes", sections 3 and 4.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from athena_backup.crew import Crew, Turn, Unit
from athena_backup.errors import DamagedError, FinalError
from athena_backup.manifest import Component, Stream, VolumeFacts
from athena_backup.operation import Operation
from athena_backup.pipeline import read_ahead, read_stream
from athena_backup.store import Store
from athena_backup.volume_entry import shown
from athena_backup.volume_pax import (
    BLOCK_BYTES,
    EXTENDED_LIMIT_BYTES,
    FILE,
    HARD_LINK,
    SEGMENT_LIMIT,
    Member,
    is_extended,
    read_header,
    read_member,
    read_records,
)
from athena_backup.volume_walk import PATH_LIMIT_SEGMENTS, STAGING_PREFIX

Content = Iterator[tuple[int, bytes]]
"""The pieces of a member's content with their offsets; holes of a sparse file are left out."""
Receiver = Callable[[bytes, Member, Content], None]
"""Takes the checked path (empty: the root), the member and its content, of which it may leave the rest."""

_PIECE_BYTES = 1 << 20
_ADVICE = "the set is damaged or was tampered with: restore another one, or this one from its second copy"


def verify_volume(component: Component, store: Store, operation: Operation) -> None:
    """Read every archive of a volume to its verified end; raises like `read_archives`."""
    read_archives(component, store, operation, lambda: contextlib.nullcontext(lambda _path, _member, _content: None))


def read_archives(
    component: Component,
    store: Store,
    operation: Operation,
    receiving: Callable[[], AbstractContextManager[Receiver]],
    crew: Crew | None = None,
) -> None:
    """Hand every member of every archive of a volume to a receiver: of one archive in order, of several at the same time.

    ``receiving`` is called for each archive, in the thread that reads it; as many are read at once as ``crew`` has slots.
    Raises `DamagedError` unless exactly what component.json promises was found and each archive ended as it should, and
    `FinalError` for a name that could lead out of the volume.
    """
    if component.volume is None:
        raise _damaged("the manifest holds no facts about this volume")
    counted = _Counted(component.volume)

    def read(stream: Stream, turn: Turn) -> None:
        # What comes next is read and decompressed while files are written.
        chunks = read_ahead(read_stream(component.name, stream.parts, store, operation, turn.check))
        with contextlib.closing(chunks), receiving() as receive:
            archive = _Archive(chunks)
            for member in archive.members():
                operation.check()
                turn.check()
                counted.add(member)
                content = archive.content(member)
                receive(checked_path(member.name), member, content)
                for _ in content:  # what the receiver had no use for, and the padding
                    pass
            archive.check_end()

    units = [
        Unit(sum(part.raw_size_bytes for part in stream.parts), partial(read, stream)) for stream in component.streams
    ]
    (crew or Crew(1)).run(units, operation.check)
    counted.check()


def checked_path(name: bytes) -> bytes:
    """A member's name as a path below the staging folder, empty for the root; raises `FinalError` for a hostile one."""
    if name in (b".", b"./"):
        return b""
    segments = name.split(b"/")
    if (
        len(segments) > PATH_LIMIT_SEGMENTS
        or b"\0" in name
        or any(segment in (b"", b".", b"..") for segment in segments)
    ):
        raise FinalError(
            f"the archive holds the name {shown(name[:1_000])!r}, which could lead out of the volume", next_step=_ADVICE
        )
    if segments[0].startswith(STAGING_PREFIX):
        raise FinalError(f"the archive holds {shown(name)!r}, a name that belongs to restores", next_step=_ADVICE)
    return name


@dataclass
class _Counted:
    """Pair of the writer's counting: the archives may never hold more, and at their end not less, than was promised."""

    promised: VolumeFacts
    members: int = 0
    files: int = 0
    content_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, member: Member) -> None:
        promised = self.promised
        with self._lock:
            self.members += 1
            if member.type == FILE:
                self.files += 1
                self.content_bytes += member.size_bytes
            is_more = (
                self.members > promised.members
                or self.files > promised.files
                or self.content_bytes > promised.content_bytes
            )
        if is_more:
            raise _damaged(f"the archive holds more than the manifest promises, from {shown(member.name)} on")

    def check(self) -> None:
        promised = self.promised
        found = (self.members, self.files, self.content_bytes)
        if found != (promised.members, promised.files, promised.content_bytes):
            raise _damaged(
                f"the archives hold {self.members} members, {self.files} files and {self.content_bytes} bytes; the manifest"
                f" promises {promised.members}, {promised.files} and {promised.content_bytes}"
            )


class _Archive:
    """One tar archive, read forwards."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = memoryview(b"")
        """What is left of the chunk that was read last; never copied as a whole, for one of zeros may be 32 MiB."""
        self._pending = 0
        """Bytes of the present member's content and padding that nobody has read yet."""

    def members(self) -> Iterator[Member]:
        """Every member up to the two zero blocks; the content of one has to be read before the next is asked for."""
        records: dict[str, bytes] = {}
        while True:
            if self._pending:
                raise RuntimeError("a member's content was not read")
            block = self._take(BLOCK_BYTES)
            if block == b"\0" * BLOCK_BYTES:
                if records or self._take(BLOCK_BYTES) != b"\0" * BLOCK_BYTES:
                    raise _damaged("the archive does not end with two zero blocks")
                return
            kind, size_bytes = read_header(block)
            if is_extended(kind):
                if records or size_bytes > EXTENDED_LIMIT_BYTES:
                    raise _damaged("the archive holds an extended header that is too large, or two in a row")
                records = read_records(self._take(size_bytes + -size_bytes % BLOCK_BYTES)[:size_bytes])
                continue
            member = read_member(block, records)
            if b"\0" in member.link or (member.type == HARD_LINK and not member.link):
                raise _damaged(f"{shown(member.name)} is a link with a broken target")
            records = {}
            self._pending = member.stored_bytes + -member.stored_bytes % BLOCK_BYTES
            yield member

    def content(self, member: Member) -> Content:
        """What belongs to the member that was given last, and behind it the padding."""
        if member.is_sparse:
            yield from self._sparse(member)
        else:
            yield from self._pieces(0, member.stored_bytes)
        if self._pending >= BLOCK_BYTES:
            raise _damaged(f"{shown(member.name)} has more content than its map of holes says")
        self._take(self._pending)
        self._pending = 0

    def _pieces(self, offset: int, length: int) -> Content:
        while length:
            piece = self._some(min(length, _PIECE_BYTES))
            self._pending -= len(piece)
            yield offset, piece
            offset += len(piece)
            length -= len(piece)

    def _sparse(self, member: Member) -> Content:
        before_map = self._pending
        numbers = self._map(member)
        position, stored = 0, member.stored_bytes - (before_map - self._pending)
        for offset, length in zip(numbers[::2], numbers[1::2], strict=True):
            if offset < position or offset + length > member.size_bytes or length > stored:
                raise _damaged(f"{shown(member.name)} has a broken map of its holes")
            yield from self._pieces(offset, length)
            position, stored = offset + length, stored - length

    def _map(self, member: Member) -> list[int]:
        """Offset and length of each piece of data in a sparse member, one after the other; it fills whole blocks."""
        rest = b""
        numbers: list[int] = []
        while not numbers or len(numbers) < 1 + 2 * numbers[0]:
            if self._pending < BLOCK_BYTES or len(numbers) > 1 + 2 * SEGMENT_LIMIT:
                raise _damaged(f"{shown(member.name)} has a broken map of its holes")
            *lines, rest = (rest + self._take(BLOCK_BYTES)).split(b"\n")
            self._pending -= BLOCK_BYTES
            for line in lines:
                if not line.isdigit() or len(line) > 19:
                    raise _damaged(f"{shown(member.name)} has a broken map of its holes")
                numbers.append(int(line))
        return numbers[1 : 1 + 2 * numbers[0]]

    def check_end(self) -> None:
        """Read the stream to its verified end; nothing may follow the two zero blocks."""
        if self._chunk or any(self._chunks):
            raise _damaged("the archive goes on behind its end")

    def _take(self, length: int) -> bytes:
        taken = self._some(length)
        while len(taken) < length:
            taken += self._some(length - len(taken))
        return taken

    def _some(self, length: int) -> bytes:
        """The next bytes, at least one and at most ``length``."""
        while length and not self._chunk:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise _damaged("the archive ends in the middle")
            self._chunk = memoryview(chunk)
        piece = bytes(self._chunk[:length])
        self._chunk = self._chunk[length:]
        return piece


def _damaged(what: str) -> DamagedError:
    return DamagedError(what, next_step=_ADVICE, step="reading")
