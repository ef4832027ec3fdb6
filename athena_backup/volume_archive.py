"""A volume into the store: the walk's entries as one tar archive, streamed, and what a restore must find again.

Mirror of `volume_extract`. Today a volume is one archive, ``0000.tar.zst``; the names, the manifest and the reader already
allow several.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from athena_backup.crew import Crew, Turn, Unit
from athena_backup.errors import FinalError
from athena_backup.manifest import Component, Part, Stream, VolumeFacts, component_folder
from athena_backup.names import SetId, new_attempt
from athena_backup.operation import Operation
from athena_backup.pipeline import PART_LIMIT_BYTES, Source, write_stream
from athena_backup.store import Store
from athena_backup.volume_members import Members
from athena_backup.volume_pax import END
from athena_backup.volume_staging import half_switched
from athena_backup.volume_walk import Walk

TORN_LIMIT = 0.01
"""Share of a volume's files that may change or vanish while they are read."""


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
) -> Component:
    """Archive a volume into a new attempt's folder and return its complete `Component`; component.json is the caller's.

    Raises `FinalError` for a directory that is not there or (unless ``allow_empty``) empty, as an unmounted one is; for one
    that a restore left in the middle of its switch; for an entry that can't be read; and where more than ``torn_limit`` of
    the files changed or vanished while being read.
    """
    half = half_switched(volume.directory)
    if half:
        raise FinalError(
            f"{volume.directory} is neither wholly old nor wholly new: the switch of restore {half[0]} was broken off",
            next_step="restore again: that finishes the switch before anything else",
        )
    began = datetime.now(UTC)
    attempt = new_attempt()
    folder = component_folder(set_id, "volume", volume.name, attempt)
    archive = _Archive(volume, Walk(volume.directory, operation), torn_limit, allow_empty=allow_empty)
    name = "0000.tar.zst"

    def write(turn: Turn) -> tuple[Part, ...]:
        return write_stream(
            Source(volume.name, lambda _: archive.chunks()),
            store,
            lambda number: f"{folder}{name}.{number:04}",
            operation,
            part_limit_bytes=part_limit_bytes,
            threads=turn.slots_now,
            on_read=turn.give_back,
        )

    # Behind every table: what the databases' snapshots hold back ends with the last of those.
    [parts] = (crew or Crew(1)).run([Unit(0, write, is_elastic=True)])
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
    """One pass over a volume; `facts` are known when its chunks have ended."""

    volume: Volume
    walk: Walk
    torn_limit: float
    allow_empty: bool
    members: Members = field(init=False)

    def __post_init__(self) -> None:
        self.members = Members(self.walk.note_vanished)

    def chunks(self) -> Iterator[bytes]:
        """The archive's bytes; ends only if the walk ended whole."""
        yield from self._pieces()
        self._judge()
        yield END

    def _pieces(self) -> Iterator[bytes]:
        for entry in self.walk.entries():
            self.walk.operation.check()
            yield from self.members.pieces(entry)

    def _judge(self) -> None:
        if self.members.count <= 1 and not self.allow_empty:
            raise FinalError(
                f"{self.volume.directory} is empty: is it mounted?",
                next_step="mount it; a volume that may be empty is named in ATHENA_EMPTY_VOLUMES",
            )
        vanished = self.walk.vanished
        lost, all_files = len(self.members.torn) + len(vanished), self.members.files + len(vanished)
        if lost > self.torn_limit * max(1, all_files):
            names = ", ".join([*self.members.torn, *vanished][:5])
            raise FinalError(
                f"{lost} of {all_files} files changed or vanished while they were read: {names}",
                next_step="back up when less is written, or raise ATHENA_TORN_LIMIT",
            )

    def facts(self) -> VolumeFacts:
        """What a restore must find again."""
        return VolumeFacts(
            members=self.members.count,
            files=self.members.files,
            content_bytes=self.members.content_bytes,
            torn=tuple(self.members.torn),
            vanished=tuple(self.walk.vanished),
            sockets=self.walk.sockets,
            other_file_systems=tuple(self.walk.other_file_systems),
            alternates=tuple(self.walk.alternates),
            uids=tuple(sorted(self.members.uids)),
            gids=tuple(sorted(self.members.gids)),
            special_modes=self.members.special_modes,
            devices=self.members.devices,
            xattr_classes=tuple(sorted(self.members.xattr_classes)),
        )
