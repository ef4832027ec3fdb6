"""A volume into the store: its entries as tar archives, streamed side by side, and what a restore must find again.

Mirror of `volume_extract`. Large files stand in archives of their own (`volume_large` says which), everything else and every
directory in the last, which is the only one of most volumes.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from athena_backup.crew import Crew, Turn, Unit
from athena_backup.errors import FinalError
from athena_backup.manifest import Component, Stream, VolumeFacts, component_folder
from athena_backup.names import SetId, new_attempt
from athena_backup.operation import Operation
from athena_backup.pipeline import PART_LIMIT_BYTES, Source, write_stream
from athena_backup.store import Store
from athena_backup.volume_entry import shown
from athena_backup.volume_large import ARCHIVE_BYTES, LARGE_BYTES, Layout, Shares, has_inode, look, open_large
from athena_backup.volume_members import Members
from athena_backup.volume_pax import END
from athena_backup.volume_staging import half_switched
from athena_backup.volume_walk import LOST_AND_FOUND, Walk, check_root, open_root

TORN_LIMIT = 0.01
"""Share of a volume's files that may change or vanish while they are read."""
# Behind every table, however small: what the databases' snapshots hold back ends with the last of those. The looks come before
# the archives, so that among these the biggest is first, whichever volume it belongs to.
_LOOK_RANK, _ARCHIVE_RANK = 1, 2


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
    crew: Crew | None = None,
    torn_limit: float = TORN_LIMIT,
    allow_empty: bool = False,
    part_limit_bytes: int = PART_LIMIT_BYTES,
    large_bytes: int = LARGE_BYTES,
    archive_bytes: int = ARCHIVE_BYTES,
) -> Component:
    """Archive a volume into a new attempt's folder and return its complete `Component`; component.json is the caller's.

    Files from ``large_bytes`` on share archives of about ``archive_bytes`` or more, which are read at the same time as far as
    ``crew`` has slots. Raises `FinalError` for a directory that is not there or (unless ``allow_empty``) empty, as an
    unmounted one is; for one that a restore left in the middle of its switch; for an entry that can't be read; and where more
    than ``torn_limit`` of the files changed or vanished while being read.
    """
    half = half_switched(volume.directory)
    if half:
        raise FinalError(
            f"{volume.directory} is neither wholly old nor wholly new: the switch of restore {half[0]} was broken off",
            next_step="restore again: that finishes the switch before anything else",
        )
    crew = crew or Crew(1)
    began = datetime.now(UTC)
    attempt = new_attempt()
    folder = component_folder(set_id, "volume", volume.name, attempt)

    def looked(turn: Turn) -> Layout:
        def check() -> None:
            turn.check()
            operation.check()

        own = os.dup(root)  # the other is closed if it hangs, and is left to itself
        try:
            return look(own, check, large_bytes=large_bytes, archive_bytes=archive_bytes)
        finally:
            os.close(own)

    def write(number: int, chunks: Callable[[], Iterator[bytes]], turn: Turn) -> Stream:
        def threads() -> int:
            turn.check()
            return turn.slots_now()

        name = f"{number:04}.tar.zst"
        parts = write_stream(
            Source(volume.name, lambda _: chunks()),
            store,
            lambda part: f"{folder}{name}.{part:04}",
            operation,
            part_limit_bytes=part_limit_bytes,
            threads=threads,
            on_read=turn.give_back,
            beside=turn.others,
        )
        return Stream(name=name, parts=parts)

    root = open_root(volume.directory)
    try:
        [layout] = crew.run([Unit(0, looked, rank=_LOOK_RANK)], operation.check)
        shares = Shares(layout)
        walk = Walk(volume.directory, operation, may_enter=shares.may_enter)
        large = [_LargeFiles(root, [file.path for file in files], shares) for files in layout.archives]
        last = _Rest(root, walk, shares)

        def judged() -> VolumeFacts:
            facts = _facts([*(archive.members for archive in large), last.members], walk, shares.lost())
            _judge(
                facts,
                walk.missed_files,
                volume,
                torn_limit,
                allow_empty=allow_empty,
                lost_and_found=last.lost_and_found,
            )
            return facts

        if not large:
            # Before the archive's end, so that one that is refused is never whole.
            last.before_end = judged
        archives = [*(archive.chunks for archive in large), last.chunks]
        sizes_bytes = [*(sum(file.size_bytes for file in files) for files in layout.archives), layout.rest_bytes]
        units = [
            Unit(size_bytes, partial(write, number, chunks), is_elastic=True, rank=_ARCHIVE_RANK)
            for number, (size_bytes, chunks) in enumerate(zip(sizes_bytes, archives, strict=True))
        ]
        streams = crew.run(units, operation.check)
        check_root(volume.directory, os.fstat(root))
        facts = judged()
    finally:
        os.close(root)
    return Component(
        name=volume.name,
        kind="volume",
        attempt=attempt,
        run_id=run_id,
        state="complete",
        began=began,
        ended=datetime.now(UTC),
        streams=tuple(streams),
        volume=facts,
    )


class _LargeFiles:
    """An archive of large files alone, without the folders in which they lie."""

    def __init__(self, root: int, paths: Sequence[bytes], shares: Shares) -> None:
        self.members = Members(lambda _: None)
        self._root = root
        self._paths = paths
        self._shares = shares

    def chunks(self) -> Iterator[bytes]:
        """The archive's bytes."""
        root = os.dup(self._root)  # the caller's is closed if it is told to stop
        try:
            for path in self._paths:
                yield from self._file(root, path)
        finally:
            os.close(root)
        yield END

    def _file(self, root: int, path: bytes) -> Iterator[bytes]:
        with open_large(root, path) as entry:
            if entry is None:
                self._shares.give_back(path, is_there=False)
                return
            is_linked = entry.status.st_nlink > 1
            if is_linked and self._shares.give_back(path, is_there=True):
                return
            if not self._shares.claim(path):
                return
            # Renamed since the walk came by, as logs are when a new one is begun: under its new name nobody gives it.
            seen = self._shares.seen_by_walk(path)
            is_aside = seen not in (None, entry.status.st_ino) and has_inode(entry.folder, seen)
            yield from self.members.pieces(entry)
            # A second name since the walk came by: it comes back as two files.
            if (is_linked or is_aside) and shown(path) not in self.members.torn:
                self.members.torn.append(shown(path))


@dataclass
class _Rest:
    """The last archive: one pass over the tree for everything that no other archive has."""

    root: int
    walk: Walk
    shares: Shares
    before_end: Callable[[], object] = lambda: None
    """May refuse the archive when its last member is read."""
    members: Members = field(init=False)
    lost_and_found: int = 0
    """How many members are no content, but made with the file system."""

    def __post_init__(self) -> None:
        self.members = Members(self.walk.note_vanished)

    def chunks(self) -> Iterator[bytes]:
        """The archive's bytes; ends only if the walk ended whole."""
        yield from self._pieces()
        self.before_end()
        yield END

    def _pieces(self) -> Iterator[bytes]:
        for entry in self.walk.entries(self.root):
            self.walk.operation.check()
            if entry.path == b".":
                for path, folder in self.shares.end_walk():
                    yield self.members.folder(path, folder.status, folder.xattrs)
            if self.shares.is_walks(entry):
                self.lost_and_found += entry.path == LOST_AND_FOUND and stat.S_ISDIR(entry.status.st_mode)
                yield from self.members.pieces(entry)


def _judge(
    facts: VolumeFacts, missed_files: int, volume: Volume, torn_limit: float, *, allow_empty: bool, lost_and_found: int
) -> None:
    # The root, and what a disk has that was just formatted: it may not be the one that is meant.
    if facts.members <= 1 + lost_and_found and not allow_empty:
        raise FinalError(
            f"{volume.directory} is empty: is it mounted?",
            next_step="mount it; a volume that may be empty is named in ATHENA_EMPTY_VOLUMES",
        )
    vanished = len(facts.vanished) + missed_files
    lost, all_files = len(facts.torn) + vanished, facts.files + vanished
    if lost > torn_limit * max(1, all_files):
        names = ", ".join([*facts.torn, *facts.vanished][:5])
        raise FinalError(
            f"{lost} of {all_files} files changed or vanished while they were read: {names}",
            next_step="back up when less is written, or raise ATHENA_TORN_LIMIT",
        )


def _facts(archives: Sequence[Members], walk: Walk, lost: Iterable[str]) -> VolumeFacts:
    """What a restore must find again, over all archives."""
    return VolumeFacts(
        members=sum(one.count for one in archives),
        files=sum(one.files for one in archives),
        content_bytes=sum(one.content_bytes for one in archives),
        torn=tuple(path for one in archives for path in one.torn),
        vanished=(*walk.vanished, *lost),
        sockets=walk.sockets,
        other_file_systems=tuple(walk.other_file_systems),
        alternates=tuple(walk.alternates),
        uids=tuple(sorted({uid for one in archives for uid in one.uids})),
        gids=tuple(sorted({gid for one in archives for gid in one.gids})),
        special_modes=any(one.special_modes for one in archives),
        devices=sum(one.devices for one in archives),
        xattr_classes=tuple(sorted({name for one in archives for name in one.xattr_classes})),
    )
