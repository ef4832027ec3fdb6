"""A database's streams into its staging database ("PostgreSQL", section 4).

First the schema, then the dump's data and all streams of bulk tables at once, and the indexes and keys of a big table as soon as
its last row is in; then everything else: other indexes, foreign keys, triggers and, last of all, the rights: an owner may have
taken his own right to write from himself.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from sqlalchemy import text

from athena_backup.crew import Crew, Turn, Unit
from athena_backup.errors import AthenaError, FinalError
from athena_backup.manifest import Component, Stream
from athena_backup.operation import Operation
from athena_backup.pipeline import read_part, read_stream
from athena_backup.postgres.archive_head import ArchiveHead, unnamed_file
from athena_backup.postgres.bulk import table_oid
from athena_backup.postgres.clients import client_version
from athena_backup.postgres.contents import Contents, ForeignKey, TableEntries, are_rights, lines_of
from athena_backup.postgres.copy_in import load_ranges
from athena_backup.postgres.order import order_dependent_tables
from athena_backup.postgres.sessions import (
    Database,
    cancelled_with,
    connection_string,
    libpq_environment,
    quoted,
    run_sql,
    session,
)
from athena_backup.process import Ended, running
from athena_backup.store import Store

# pg_restore sets it whatever server it talks to, since version 17; an older server doesn't know it.
_TRANSACTION_TIMEOUT_SINCE = 170_000
_PARALLEL_EXTENSION_SINCE = 160_000
_SECTIONS = ("pre-data", "data", "post-data")
# A table with foreign descendants is not among them: their servers would be asked, and may be gone.
_ANALYZED = text(
    "WITH RECURSIVE asking(oid) AS (SELECT i.inhparent FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class f"
    " ON f.oid OPERATOR(pg_catalog.=) i.inhrelid WHERE f.relkind OPERATOR(pg_catalog.=) 'f'"
    " UNION SELECT i.inhparent FROM pg_catalog.pg_inherits i JOIN asking a ON a.oid OPERATOR(pg_catalog.=) i.inhrelid)"
    " SELECT n.nspname AS schema_name, c.relname AS name,"
    " coalesce(pg_catalog.pg_table_size(c.oid), 0)::bigint AS size_bytes"
    " FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"
    " WHERE c.relkind IN ('r', 'm', 'p') AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_toast'"
    " AND c.relpersistence <> 't' AND c.oid NOT IN (SELECT oid FROM asking) ORDER BY size_bytes DESC, c.oid"
)
_BATCH_BYTES = 64 << 20
_BATCH_LIMIT = 500
logger = logging.getLogger("athena_backup.postgres")
SOON_BYTES = 64 << 20
"""Of smaller tables the indexes are made by one parallel pg_restore at the end, without a process for each."""


@dataclass(frozen=True)
class Loading:
    """What is loaded into which staging database, and by which `pg_restore`."""

    component: Component
    staging: Database
    client: Path
    server: int
    """The destination's version, such as 180006."""
    store: Store
    operation: Operation
    soon_bytes: int = SOON_BYTES
    """From how many raw bytes on a table's indexes are made while other tables load."""

    def run(self, crew: Crew) -> None:
        """Load everything and analyze it; raises the first thing that fails: the staging database is of no use then."""
        head = self._head(self.component.streams[0])
        with unnamed_file(head.content) as archive:
            sections = {section: lines_of(head.listing(f"--section={section}")) for section in _SECTIONS}
            schema = _but_rights(sections["pre-data"])
            # As much waits for it: a database whose schema comes late would be left alone at the end.
            crew.run([Unit(self.component.raw_size_bytes, lambda _: self.restore(archive, entries=schema))])
            with session(self.staging.url) as connection:
                last = list(order_dependent_tables(connection).values())
            plan = _Plan(self, archive, head.listing("--verbose"), sections, last, crew.jobs)
            crew.run(plan.units)
        self._analyze_rest(crew, frozenset(plan.analyzed))

    def _head(self, dump: Stream) -> ArchiveHead:
        head = ArchiveHead(self.client, "latin-1", self.operation)
        with contextlib.closing(read_part(dump.parts[0], self.store, self.operation)) as chunks:
            for chunk in chunks:
                head.feed(chunk)
                if head.is_whole:
                    break
        return head

    def load(self, streams: Sequence[Stream], turn: Turn, *, are_all: bool) -> None:
        """Load some streams of a table's rows; see `load_ranges`."""
        load_ranges(self.component.name, streams, self.staging, self.store, self.operation, turn, are_all=are_all)

    def restore(
        self,
        archive: str | None = None,
        *,
        entries: Sequence[bytes] | None = None,
        jobs: int = 1,
        feed: Stream | None = None,
        turn: Turn | None = None,
    ) -> None:
        """One run of pg_restore, of the archive or of the stream that is fed to it: all of it, or some ``entries``.

        ``turn`` stops the feeding when another stream of the component has failed.
        """
        command = [str(self.client), "--no-password", f"--dbname={connection_string(self.staging.database)}"]
        sets_unknown = self.server < _TRANSACTION_TIMEOUT_SINCE <= client_version(self.client)
        if not sets_unknown:
            command += ["--exit-on-error", f"--jobs={jobs}"] if jobs > 1 else ["--exit-on-error"]
        url = self.staging.url
        environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", **libpq_environment(url)}
        feeding = None
        with contextlib.ExitStack() as stack:
            if entries is not None:
                chosen = b"".join(entry + b"\n" for entry in entries)
                command.append(f"--use-list={stack.enter_context(unnamed_file(chosen))}")
            if archive is not None:
                command.append(archive)
            child = stack.enter_context(
                running(command, self.operation, environment=environment, reads=feed is not None)
            )
            if feed is not None:
                feeding = _Feeding(child.stdin, self.component.name, feed, self.store, self.operation, turn)
            ended = child.wait(self.operation)
            if feeding is not None:
                # The pipe's read end is gone with the child, so a feeder that still writes gets EPIPE and ends.
                feeding.join()
        self.operation.check()  # a cancelled operation kills the child: that is no failure of pg_restore
        if feeding is not None and feeding.error is not None:
            raise feeding.error
        if ended.exit_code != 0 and not (sets_unknown and failed_only_to_set_transaction_timeout(ended)):
            raise FinalError(
                ended.how(), next_step="the live database is untouched; correct the cause and restore again"
            )
        if feeding is not None and not feeding.finished:
            raise FinalError("pg_restore ended before it had read the whole dump")

    def _analyze_rest(self, crew: Crew, analyzed: Collection[str]) -> None:
        """ANALYZE whatever a bare ANALYZE would and that is not ``analyzed``, several tables at once, the biggest first."""
        with session(self.staging.url) as connection:
            tables = [
                (name, row.size_bytes)
                for row in connection.execute(_ANALYZED)
                if (name := f"{quoted(row.schema_name)}.{quoted(row.name)}") not in analyzed
            ]
        batches: list[tuple[list[str], int]] = []
        for name, size_bytes in tables:
            if not batches or batches[-1][1] + size_bytes > _BATCH_BYTES or len(batches[-1][0]) >= _BATCH_LIMIT:
                batches.append(([], 0))
            names, batch_bytes = batches[-1]
            batches[-1] = ([*names, name], batch_bytes + size_bytes)
        crew.run([Unit(size_bytes, partial(self.analyze, names)) for names, size_bytes in batches])

    def analyze(self, tables: Sequence[str], turn: Turn) -> None:
        """ANALYZE some tables, one after the other, by their quoted names.

        One that can't be is told in the log: its rows are there, and autovacuum looks at it again.
        """
        turn.check()
        try:
            with session(self.staging.url) as connection, cancelled_with(connection, self.operation):
                run_sql(connection, f"ANALYZE {', '.join(tables)}")
        except AthenaError as error:
            self.operation.check()
            if len(tables) > 1:
                for table in tables:
                    self.analyze([table], turn)
            else:
                logger.warning("%s of %s is not analyzed: %s", tables[0], self.component.name, error)


class _Plan:
    """The units of a load, each after what it needs."""

    def __init__(
        self,
        loading: Loading,
        archive: str,
        verbose: bytes,
        sections: Mapping[str, Sequence[bytes]],
        last: Sequence[tuple[str, str]],
        jobs: int,
    ) -> None:
        """``verbose``: the dump's list of contents; ``sections``: its entries by section; ``last``: the tables, by schema and
        name, that are loaded one by one when all others are full; ``jobs``: how many units can be at work.
        """
        self.units: list[Unit[None]] = []
        self.analyzed: list[str] = []
        """The tables that are analyzed by one of the units."""
        self._loading = loading
        self._archive = archive
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
            lambda turn: loading.restore(entries=_but_rights(data), feed=dump, turn=turn),
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
                own = self._add_entries(entries, name, oid, size_bytes, own)
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
        rest = [*(line for line in after if line not in made_at), *rights]
        if rest:
            self._add(loading.component.raw_size_bytes, self._make(rest), sorted(set(everything)), is_elastic=True)

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
        """How many sessions load a table: one, unless the others would have nothing else to do.

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

    def _make(self, lines: Sequence[bytes]) -> Callable[[Turn], None]:
        return lambda turn: self._loading.restore(self._archive, entries=lines, jobs=turn.slots)


def failed_only_to_set_transaction_timeout(ended: Ended) -> bool:
    """Whether the one error of a `pg_restore` that went on after errors was that the server is too old for that setting.

    A dump of `pg_dump` 17 or newer can be read by no older `pg_restore`, so there is none that suits an older server.
    """
    errors = [line for line in ended.stderr if line.startswith("pg_restore: error:")]
    return (
        ended.exit_code == 1
        and len(errors) == 1
        and "Command was: SET transaction_timeout = 0;" in ended.stderr
        and ended.stderr[-1] == "pg_restore: warning: errors ignored on restore: 1"
    )


def _but_rights(entries: Sequence[bytes]) -> list[bytes]:
    return [entry for entry in entries if not are_rights(entry)]


def _size(stream: Stream) -> int:
    return sum(part.raw_size_bytes for part in stream.parts)


class _Feeding:
    """A thread that hands a stored stream to a child's stdin, to its verified end."""

    def __init__(
        self,
        stdin: IO[bytes],
        component: str,
        stream: Stream,
        store: Store,
        operation: Operation,
        turn: Turn | None = None,
    ) -> None:
        # The thread owns a descriptor of its own, and the pipe object is closed as such: closing the bare number under it
        # would let the object close it once more, when it may already be some other thread's file (seen).
        self._descriptor = os.dup(stdin.fileno())
        stdin.close()
        self._component = component
        self._stream = stream
        self._store = store
        self._operation = operation
        self._turn = turn
        self.error: AthenaError | None = None
        self.finished = False
        self._thread = threading.Thread(target=self._run, name=f"feed-{component}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until it has written everything, or found nobody who reads."""
        self._thread.join()

    def _run(self) -> None:
        try:
            for chunk in read_stream(self._component, self._stream.parts, self._store, self._operation):
                if self._turn is not None:
                    self._turn.check()
                view = memoryview(chunk)
                while view:
                    view = view[os.write(self._descriptor, view) :]
            self.finished = True
        except BrokenPipeError:
            return  # the child's exit code tells why it stopped reading
        except AthenaError as error:
            self.error = error
        finally:
            os.close(self._descriptor)
