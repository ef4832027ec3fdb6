"""In which order a database is loaded: what can be done side by side, and what has to wait for what ("PostgreSQL", section 4)."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import Connection, text

from athena_backup.crew import Turn, Unit
from athena_backup.errors import FinalError, PassingError, UnavailableError
from athena_backup.manifest import Stream
from athena_backup.postgres.bulk import table_oid
from athena_backup.postgres.contents import (
    Contents,
    ForeignKey,
    TableEntries,
    are_rights,
    but_rights,
    enables_row_security,
    fills_view,
    is_event_trigger,
    view_name,
)
from athena_backup.postgres.sessions import is_on_this_machine, quoted

if TYPE_CHECKING:
    from athena_backup.postgres.load import Loading

_PARALLEL_EXTENSION_SINCE = 160_000
_TRIES = 3
WORKERS = "max_parallel_maintenance_workers"
# Null in a server that is older than the setting (11).
_ALLOWED = text(f"SELECT pg_catalog.current_setting('{WORKERS}', true)::int")


@dataclass(frozen=True)
class IndexWorkers:
    """How many processes the server takes to help with an index where it has to share its cores with us."""

    allowed: int | None
    """What the server is set to; None where it is not to be changed."""
    cores: int

    @classmethod
    def of(cls, connection: Connection) -> "IndexWorkers":
        """As the server behind ``connection`` has it; one on another machine knows best itself."""
        allowed = connection.execute(_ALLOWED).scalar_one()
        return cls(allowed if is_on_this_machine(connection) else None, len(os.sched_getaffinity(0)))

    def beside(self, others: int) -> int | None:
        """For each of several sessions at once, this one and ``others``; None: as the server is set.

        With two more for each of two builds, six processes shared two cores with the session that loads the biggest table, for
        which everything else waited in the end: 70 s instead of 45 (tried).
        """
        return None if self.allowed is None else max(0, min(self.allowed, self.cores // (others + 1) - 1))


class Plan:
    """The units of a load, each after what it needs."""

    def __init__(
        self,
        loading: "Loading",
        archive: str,
        verbose: bytes,
        sections: Mapping[str, Sequence[bytes]],
        last: Sequence[tuple[str, str]],
        jobs: int,
        workers: IndexWorkers,
    ) -> None:
        """``verbose``: the dump's list of contents; ``sections``: its entries by section; ``last``: the tables, by schema and
        name, that are loaded one by one when all others are full; ``jobs``: how many units can be at work.
        """
        self.units: list[Unit[None]] = []
        self.row_security: list[Unit[None]] = []
        """What has tables hide rows, from their owner too where that is forced: he has to count them before."""
        self.filling_views: list[Unit[None]] = []
        """What fills the materialized views, whose queries may call anything."""
        self.unfilled: list[str] = []
        """The materialized views that could not be filled, each with what to do and why."""
        self.event_triggers: list[Unit[None]] = []
        """What makes the event triggers, of which the next DDL, or the next login, calls the functions."""
        self.analyzed: list[str] = []
        """The tables that are analyzed by one of the units."""
        self._loading = loading
        self._archive = archive
        self._workers = workers
        data, after = sections["data"], sections["post-data"]
        rights = [line for line in [*sections["pre-data"], *data] if are_rights(line)]
        dump, *streams = loading.component.streams
        tables: dict[tuple[str, str], list[Stream]] = {}
        for stream in streams:
            if stream.table is not None:
                tables.setdefault((stream.table.schema_name, stream.table.name), []).append(stream)
        oids = {name: oid for name, some in tables.items() if (oid := table_oid(some[0])) is not None}
        contents = Contents(verbose, after)
        soon = contents.of_tables()
        # What is known of these is not all before the last unit; whoever sees to the rest analyzes them.
        self._unfinished = contents.parents | contents.left_by(
            frozenset(line for entries in soon.values() for line in entries.lines)
        )
        # First of all, as what it fills are most tables.
        dumped = self._add(
            loading.component.raw_size_bytes,
            lambda turn: loading.restore(entries=but_rights(data), feed=dump, turn=turn),
        )
        loaded = {-1: [dumped]}
        """By OID: after which units a table is full; -1: those of the dump."""
        small = [line for oid, entries in soon.items() if oid not in oids.values() for line in entries.lines]
        needs_of_small = [dumped]
        made_at: dict[bytes, int] = {}
        late = [name for name in last if name in tables]
        for name in [*(name for name in tables if name not in late), *late]:
            some, oid = tables[name], oids.get(name, -2)
            # By what the table holds in all: the sooner its last range is in, the sooner its indexes can be made.
            size_bytes = sum(map(_size, some))
            needs = [one for units in loaded.values() for one in units] if name in late else []
            count = min(len(some), self._connections(size_bytes, jobs))
            own = [
                self._add(size_bytes, partial(loading.load, some[number::count], are_all=count == 1), needs)
                for number in range(count)
            ]
            entries = soon.get(oid, TableEntries((), ()))
            if size_bytes >= loading.soon_bytes:
                # After the dump's rows too: an index may call an extension's function, and that what the extension is configured
                # by (PostGIS: spatial_ref_sys).
                own = self._add_entries(entries, name, oid, size_bytes, [*own, dumped])
                made_at |= dict.fromkeys(entries.lines, own[-1])
            else:
                small += entries.lines
                needs_of_small += own
            loaded[oid] = [*loaded.get(oid, []), *own]
        if small:
            together = self._add(_size(dump), self._make(small), needs_of_small, is_elastic=True)
            made_at |= dict.fromkeys(small, together)
        everything = [one for units in loaded.values() for one in units] + [*made_at.values()]
        full = {
            oid: [*units, *(made_at[line] for line in soon[oid].lines if line in made_at)] if oid in soon else units
            for oid, units in loaded.items()
        }
        everything += self._add_foreign_keys(contents.foreign_keys(), full, made_at)
        views = [line for line in after if fills_view(line)]
        triggers = [line for line in after if is_event_trigger(line)]
        hiding = [line for line in after if enables_row_security(line)]
        others = {*made_at, *views, *triggers, *hiding}
        rest = [*(line for line in after if line not in others), *rights]
        size_bytes = loading.component.raw_size_bytes
        if rest:
            self._add(size_bytes, self._make(rest), sorted(set(everything)), is_elastic=True)
        if hiding:
            self.row_security.append(Unit(0, self._make(hiding)))
        if views:
            self.filling_views.append(Unit(size_bytes, self._fill(views), is_elastic=True))
        if triggers:
            self.event_triggers.append(Unit(0, self._make(triggers)))

    def _add_foreign_keys(
        self, keys: Sequence[ForeignKey], full: Mapping[int, Sequence[int]], made_at: dict[bytes, int]
    ) -> list[int]:
        """The foreign keys of big tables, one after the other, as two of one table would wait for each other's locks.

        ``full``: after which units a table has its rows and indexes. Those between tables that are full sooner come first. Only
        where every table is one of those that COPY loads.
        """
        possible = [key for key in keys if key.tables <= full.keys() and key.needs <= made_at.keys()]
        units: list[int] = []
        for key in sorted(possible, key=lambda one: max(max(full[table]) for table in one.tables)):
            needs = {one for table in key.tables for one in full[table]} | {made_at[one] for one in key.needs}
            units.append(self._add(0, self._make([key.line]), [*sorted(needs), *units[-1:]]))
            made_at[key.line] = units[-1]
        return units

    def _connections(self, size_bytes: int, jobs: int) -> int:
        """How many sessions load a table: one, unless the others would have nothing else to do, and it was read in ranges.

        One writes rows as frozen. And before version 16 several wait for each other whenever the table's file grows (tried: two
        were hardly faster than one, for a third more of the server's processor time).
        """
        if self._loading.server < _PARALLEL_EXTENSION_SINCE:
            return 1
        return max(1, min(jobs, size_bytes * jobs // max(1, self._loading.component.raw_size_bytes)))

    def _add_entries(
        self, entries: TableEntries, name: tuple[str, str], oid: int, size_bytes: int, own: list[int]
    ) -> list[int]:
        """What is made of a table while others load; returns the positions of the last ones."""
        last = own
        for line in entries.exclusive:
            last = [self._add(size_bytes, self._make([line]), last)]
        # Those that can be made at the same time come last, so that nothing is idle at the end.
        last = [self._add(size_bytes, self._make([line]), last) for line in entries.shared] or last
        if oid in self._unfinished:
            return last
        table = f"{quoted(name[0])}.{quoted(name[1])}"
        self.analyzed.append(table)
        return [self._add(size_bytes, lambda turn: self._loading.analyze([table], turn), last)]

    def _add(
        self, size_bytes: int, work: Callable[[Turn], None], after: Sequence[int] = (), *, is_elastic: bool = False
    ) -> int:
        self.units.append(Unit(size_bytes, work, is_elastic=is_elastic, after=tuple(after)))
        return len(self.units) - 1

    def _fill(self, views: Sequence[bytes]) -> Callable[[Turn], None]:
        """Fill materialized views; where that fails for all together, one by one, as one may ask a server that is gone.

        What is in them is derived from what was restored: one that can't be filled is told, and is no reason to throw all away.
        """

        def work(turn: Turn) -> None:
            try:
                self._make(views)(turn)
            except FinalError:
                self._loading.operation.check()  # a cancelled one is no view that can't be filled
                for line in views:
                    turn.check()
                    try:
                        self._make([line])(turn)
                    except FinalError as error:
                        self._loading.operation.check()
                        self.unfilled.append(
                            f"{view_name(line)} is empty, REFRESH it once its cause is mended: {error.cause}"
                        )

        return work

    def _make(self, lines: Sequence[bytes]) -> Callable[[Turn], None]:
        """Some of the dump's entries, by as many sessions as the unit has slots."""

        def work(turn: Turn) -> None:
            sessions = min(turn.slots, len(lines))
            workers = self._workers.beside(turn.others + sessions - 1)
            for left in reversed(range(_TRIES if len(lines) == 1 else 1)):
                try:
                    self._loading.restore(self._archive, entries=lines, jobs=sessions, workers=workers, turn=turn)
                    return
                except UnavailableError:
                    raise  # whether the entry was made is unknown
                except PassingError:
                    # An index by which its table is clustered, or that is its replica identity, takes a second, stronger lock
                    # once it is made. Of two that waited for each other's, one has left nothing: an entry is one transaction.
                    if not left:
                        raise

        return work


def _size(stream: Stream) -> int:
    return sum(part.raw_size_bytes for part in stream.parts)
