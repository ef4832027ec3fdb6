"""One database into the store: `pg_dump` under the cut's snapshot, as a stream, and beside it the bulk tables by COPY.

Both are believed only when everything ended well, and when each table's rows are in exactly one of them.

An exit code of 0 is not completeness ("PostgreSQL", section 2): stderr is read against the table of known warnings below,
and a warning that is not on it fails the component.
"""

import contextlib
import logging
import os
import re
import select
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import zstandard

from athena_backup.crew import Crew, Turn, Unit
from athena_backup.errors import AthenaError, FinalError, PassingError
from athena_backup.manifest import Component, Part, Stream, TableCount, component_folder
from athena_backup.names import SetId, new_attempt
from athena_backup.operation import LOOK_SECONDS, Operation
from athena_backup.pipeline import PART_LIMIT_BYTES, Source, write_stream
from athena_backup.postgres.archive_head import ArchiveHead
from athena_backup.postgres.bulk import BULK_BYTES, BulkTable, TableRange, bulk_tables, range_size
from athena_backup.postgres.clients import client_version, find_client, lost_connection
from athena_backup.postgres.copy_in import rows_of
from athena_backup.postgres.copy_login import unreachable
from athena_backup.postgres.copy_out import CopySessions, RangeReading, count_rows
from athena_backup.postgres.copy_places import CopyPlaces
from athena_backup.postgres.cut import Cut
from athena_backup.postgres.facts import read_facts, tables_with_rows, translating, with_dump
from athena_backup.postgres.greeting import greeting
from athena_backup.postgres.held import Held
from athena_backup.postgres.order import rerouted_partitions
from athena_backup.postgres.sessions import (
    Database,
    child_connection,
    codec,
    driver_of,
    is_on_this_machine,
    libpq_environment,
)
from athena_backup.process import STDERR_LIMIT_LINES, Ended, running
from athena_backup.store import Store

DUMP = "dump.pgc.zst"
_CHUNK_BYTES = 256 << 10
_MAGIC = b"PGDMP"
_LOCK_WAIT_MILLISECONDS = 60_000
_CATALOGS_BYTES = 64 << 20
_FIRST_RANK = -1
_LIGHT_BYTES = 64 << 20
"""To count the rows of so much takes a moment."""
_TABLE_PART_BYTES = 4 << 30
"""A copy of the set that breaks off begins no more than a part again."""
_GLOBALS_LIMIT_BYTES = 64 << 20
_GLOBALS_LIMIT_SECONDS = 60
"""The cut is held meanwhile, and no restore needs them."""
logger = logging.getLogger("athena_backup.postgres")

# What pg_dump may say without being wrong. True: something was left out, and the manifest has to say so.
_KNOWN_WARNINGS: tuple[tuple[re.Pattern[str], bool], ...] = (
    (re.compile(r"^pg_dump: warning: subscriptions not dumped because current user is not a superuser$"), True),
    (re.compile(r"^pg_dump: warning: there are circular foreign-key constraints"), False),
    (re.compile(r"^pg_dump: warning: could not resolve dependency loop"), False),
    (re.compile(r'^WARNING:  database ".*" has a collation version mismatch$'), False),
    (re.compile(r"^(pg_dump: (detail|hint): |DETAIL:  |HINT:  )"), False),
)


def write_database(
    database: Database,
    cut: Cut,
    store: Store,
    set_id: SetId,
    run_id: str,
    operation: Operation,
    *,
    crew: Crew | None = None,
    places: CopyPlaces | None = None,
    client_directories: Sequence[Path] = (),
    part_limit_bytes: int = PART_LIMIT_BYTES,
    bulk_bytes: int = BULK_BYTES,
    range_bytes: int | None = None,
) -> Component:
    """Dump one database of the cut into a new attempt's folder and return its complete `Component`.

    ``crew`` does the work; without one, one unit is done after the other. ``places`` are those of all databases that share a budget
    of connections. Tables of ``bulk_bytes`` or more are read by COPY, in ranges of about ``range_bytes`` or, for None, as
    `range_size` has it. component.json is the caller's.

    Raises the fault that the cut has for it, `FinalError` for a `pg_dump` that ended badly or said something unknown,
    `PassingError` for a broken connection while the holders live, and the store's errors.
    """
    held = cut.of(database.name)
    began = datetime.now(UTC)
    attempt = new_attempt()
    folder = component_folder(set_id, "database", database.name, attempt)
    client = find_client("pg_dump", held.identity.version, client_directories)
    lister = find_client("pg_restore", client_version(client), [client.parent])
    head = ArchiveHead(lister, codec(held.reader), operation)
    tables = tables_with_rows(held, operation)
    sizes = {table.oid: table.size_bytes for table in tables}
    operation.expect(database.name, sum(sizes.values()))
    bulk: list[BulkTable] = []
    with held.locks_lock, translating(held, operation):
        is_via_root = bool(rerouted_partitions(held.locks))
    if reason := unreachable(database.url):
        logger.warning("%s is read by pg_dump alone, not by parallel COPY: %s", database.name, reason)
    else:
        with translating(held, operation):
            bulk = bulk_tables(held, sizes, bulk_bytes=bulk_bytes)
    bulk_oids = {table.oid for table in bulk}
    dump = _Dump(held, client, head, bulk, is_via_root=is_via_root)

    def write(
        name: str, chunks: Callable[[Operation], Iterator[bytes]], turn: Turn, limit_bytes: int = part_limit_bytes
    ) -> tuple[Part, ...]:
        return write_stream(
            Source(database.name, chunks),
            store,
            lambda number: f"{folder}{name}.{number:04}",
            operation,
            part_limit_bytes=limit_bytes,
            on_read=turn.give_back,
            beside=turn.others,
        )

    crew = crew or Crew(1)
    places = places or CopyPlaces(crew.jobs)
    all_bytes = sum(sizes.values())
    small_bytes = sum(size for oid, size in sizes.items() if oid not in bulk_oids)
    with held.locks_lock, translating(held, operation):
        is_near = is_on_this_machine(held.locks)

    def pieces_of(table: BulkTable) -> list[TableRange]:
        if range_bytes is None and operation.bytes_per_second is not None:
            return table.ranges(
                None
            )  # ranges would have to be counted, which reads the table once more, at no limited rate
        return table.ranges(range_bytes or range_size(table.size_bytes, all_bytes, crew.jobs, is_near=is_near))

    pieces = [pieces_of(table) for table in bulk]
    ranges = [one for some in pieces for one in some]
    split = [some[0].table for some in pieces if len(some) > 1]
    sessions = CopySessions(held, [*split, *(table for table in bulk if table not in split)], places)

    def dumped(turn: Turn, operation: Operation) -> Iterator[bytes]:
        with places.one():
            yield from dump.chunks(turn, operation)
        head.sequences()  # looked up now, while tables are read, not when all have ended

    def write_range(of: TableRange, turn: Turn) -> Stream:
        reading = RangeReading(sessions, of, turn)
        parts = write(of.stream_name, reading.chunks, turn, min(part_limit_bytes, _TABLE_PART_BYTES))
        return Stream(name=of.stream_name, parts=parts, table=of.data(reading.rows))

    units: list[Unit[Any]] = [
        # Before any table that is left to COPY: it locks all tables, which DDL that comes meanwhile would be in the way of. And the
        # sooner it looks at views and sequences, which nobody can lock, the fewer of them are dropped before.
        Unit(
            small_bytes + _CATALOGS_BYTES,
            lambda turn: Stream(name=DUMP, parts=write(DUMP, partial(dumped, turn), turn)),
            rank=_FIRST_RANK,
        ),
        # At once: what it looks at is locked for a moment only, and DDL that comes later may wait. Where many rows have to be
        # counted it needs a slot, the first.
        Unit(
            small_bytes + 2 * _CATALOGS_BYTES,
            lambda _: read_facts(held, operation, client, [one for one in tables if one.oid not in bulk_oids]),
            rank=_FIRST_RANK,
            needs_slot=not bulk or small_bytes > _LIGHT_BYTES,
        ),
        *(Unit(of.size_bytes, partial(write_range, of)) for of in ranges),
        *(Unit(table.size_bytes, partial(count_rows, sessions, table, operation)) for table in split),
    ]
    try:
        with contextlib.closing(sessions):
            stream, facts, *rest = crew.run(units, operation.check)
        held.prove()
    finally:
        # Before any other error too: what can't be found any more is told by who looks for it in words that help nobody.
        if not operation.cancelled:
            held.prove_names()
    streams, counts = rest[: len(ranges)], rest[len(ranges) :]
    _check_tables(head.tables(), sizes.keys() - bulk_oids, bulk_oids)
    rows = rows_of(streams)
    missed = [
        _missed(held, table, copied, count)
        for table, count in zip(split, counts, strict=True)
        if (copied := rows[table.schema_name, table.name]) != count
    ]
    for problem in sorted(missed, key=lambda one: one.passing):
        raise problem
    version = client_version(client)
    return Component(
        name=database.name,
        kind="database",
        attempt=attempt,
        run_id=run_id,
        state="complete",
        began=began,
        ended=datetime.now(UTC),
        streams=(stream, *streams),
        server=held.server,
        database=with_dump(
            facts,
            dump.omitted,
            head.sequences(),
            f"{version // 10_000}.{version % 10_000}",
            [TableCount(schema_name=table[0], name=table[1], rows=count) for table, count in rows.items()],
        ),
    )


def _missed(held: Held, table: BulkTable, copied: int, count: int) -> AthenaError:
    """The error for ranges that have other rows than the table; of a defective index it is told, and the next try does without."""
    cause = f"the ranges of {table.full_name} have {copied} rows, the table has {count}"
    if table.has_ctid_scan or table.key is None:
        return FinalError(cause, next_step="report it, with the server's version", step="copying")
    held.defective.add(table.oid)
    problem = PassingError(
        f"{cause}: an index by {table.key.column} is defective",
        next_step=f"REINDEX TABLE {table.full_name}",
        step="copying",
    )
    logger.warning("%s; the next try reads the table without it", problem)
    return problem


def _check_tables(dumped: Collection[int], small: Collection[int], bulk: Collection[int]) -> None:
    """Raise `FinalError` unless each table's rows are in exactly one of dump and streams, whatever pg_dump made of our words."""
    if twice := set(dumped) & set(bulk):
        raise FinalError(
            f"pg_dump wrote the rows of tables that were left to COPY: OIDs {sorted(twice)[:5]}", step="dumping"
        )
    if missing := set(small) - set(dumped):
        raise FinalError(f"pg_dump left out the rows of tables: OIDs {sorted(missing)[:5]}", step="dumping")


class _Dump:
    """One run of `pg_dump` as a `Source`; ``omitted`` is known when its chunks have ended."""

    def __init__(
        self, held: Held, client: Path, head: ArchiveHead, left_out: Sequence[BulkTable], *, is_via_root: bool
    ) -> None:
        """``is_via_root``: partitions are to be filled through the table that they are of, which finds each row's own anew."""
        self._held = held
        self._client = client
        self._head = head
        self._left_out = left_out
        self._is_via_root = is_via_root
        self.omitted: list[str] = []

    def chunks(self, turn: Turn, operation: Operation) -> Iterator[bytes]:
        """The dump's bytes; ends without an error only if pg_dump ended well and the holders still live."""
        driver = driver_of(self._held.reader)
        names = [table.full_name.encode(driver.info.encoding) for table in self._left_out]
        command = [
            *(str(self._client), "--format=custom", "--compress=0", "--no-password"),
            f"--dbname={child_connection(self._held.database.database)}",
            f"--encoding={driver.info.parameter_status('server_encoding')}",
            *(f"--snapshot={self._held.snapshot}", f"--lock-wait-timeout={_LOCK_WAIT_MILLISECONDS}"),
            *(["--load-via-partition-root"] if self._is_via_root else []),
            # As bytes of the database's encoding, in which pg_dump reads them, not of this machine's locale.
            *(os.fsdecode(b"--exclude-table-data=" + name) for name in names),
        ]
        environment = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "LC_ALL": "C",
            **libpq_environment(self._held.database.url),
        }
        seen_bytes = 0
        with running(command, operation, environment=environment, writes=True) as child:
            descriptor = child.stdout.fileno()
            ready = _readable(descriptor)
            while True:
                # Also while it says nothing, as where it waits for a server: what it reads may be lost by then.
                is_ready = ready.poll(LOOK_SECONDS * 1_000)
                operation.check()
                self._held.check()
                turn.check()
                if not is_ready:
                    continue
                chunk = os.read(descriptor, _CHUNK_BYTES)
                if not chunk:
                    break
                if seen_bytes == 0 and not chunk.startswith(_MAGIC):
                    raise FinalError("pg_dump wrote something that is no dump", step="dumping")
                seen_bytes += len(chunk)
                self._head.feed(chunk)
                yield chunk
            ended = child.wait(operation)
        operation.check()
        self._held.prove()
        self._judge(ended, seen_bytes)

    def _judge(self, ended: Ended, seen_bytes: int) -> None:
        if ended.exit_code != 0:
            raise self._failure(ended)
        if seen_bytes == 0:
            raise FinalError("pg_dump ended with exit code 0 and wrote nothing", step="dumping")
        if len(ended.stderr) >= STDERR_LIMIT_LINES:
            raise FinalError(f"pg_dump wrote more than {STDERR_LIMIT_LINES} lines of warnings", step="dumping")
        strange = [line for line in ended.stderr if is_known_warning(line) is None]
        greeted = self._greeting(strange[0]) if strange else frozenset[str]()
        for line in ended.stderr:
            omits = is_known_warning(line)
            if omits is None and line not in greeted:
                raise FinalError(
                    f"pg_dump said something that is not known to be harmless: {line}",
                    next_step="if the dump is right all the same, report the line so that it can be listed as known",
                    step="dumping",
                )
            if omits:
                self.omitted.append(line.removeprefix("pg_dump: warning: "))

    def _greeting(self, line: str) -> frozenset[str]:
        """What the server tells whoever connects; where it can't be asked, the error says because of which line it should be."""
        try:
            return greeting(self._held.database.url)
        except PassingError as error:
            raise PassingError(f"pg_dump said: {line}; {error.cause}", step="dumping") from error

    def _failure(self, ended: Ended) -> AthenaError:
        said = "\n".join(ended.stderr)
        # pg_dump's --lock-wait-timeout is a statement_timeout for LOCK TABLE alone.
        if re.search(r"due to (lock|statement) timeout|could not obtain lock", said):
            waiting = "; ".join(self._held.waiting()) or "whoever waited is gone by now"
            return FinalError(
                f"pg_dump was refused a table lock: {waiting}",
                next_step="run DDL outside of backups",
                step="locking the tables",
            )
        if ended.exit_code > 0 and lost_connection(ended.stderr):
            return PassingError(ended.how(), step="dumping")
        # Views and sequences can't be locked beforehand as tables are.
        if re.search(
            r"could not open relation with OID|failed to get data for sequence|query to get data of sequence", said
        ):
            return FinalError(
                f"a view or sequence was dropped while the database was read, or may not be read: {ended.how()}",
                next_step="back up again, and run DDL outside of backups; for want of a right, GRANT SELECT on it",
                step="dumping",
            )
        return FinalError(ended.how(), step="dumping")


def is_known_warning(line: str) -> bool | None:
    """What a line of pg_dump's stderr means: True something was left out, False harmless, None unknown."""
    if not line.strip():
        return False
    return next((omits for pattern, omits in _KNOWN_WARNINGS if pattern.search(line)), None)


def _readable(descriptor: int) -> select.poll:
    """What waits for a descriptor, of whatever number: select(2) knows none from 1024 on, and a volume's files may have those."""
    ready = select.poll()
    ready.register(descriptor, select.POLLIN)
    return ready


def write_globals(
    held: Held, store: Store, set_id: SetId, operation: Operation, directories: Sequence[Path] = ()
) -> None:
    """Store the roles, grants and tablespaces of a held database's server for people to read, without passwords.

    A restore never runs it. Raises `FinalError` if `pg_dumpall` fails, and the store's errors.
    """
    client = find_client("pg_dumpall", held.identity.version, directories)
    url = held.database.url
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", **libpq_environment(url)}
    command = [
        str(client),
        "--globals-only",
        "--no-role-passwords",
        "--no-password",
        f"--dbname={child_connection(url.database or '')}",
    ]
    sql = bytearray()
    deadline = time.monotonic() + _GLOBALS_LIMIT_SECONDS
    with running(command, operation, environment=environment, writes=True) as child:
        ready = _readable(child.stdout.fileno())
        while True:
            is_ready = ready.poll(LOOK_SECONDS * 1_000)
            operation.check()
            if time.monotonic() > deadline:
                raise PassingError(
                    f"pg_dumpall took longer than {_GLOBALS_LIMIT_SECONDS} s", step="writing the globals"
                )
            if not is_ready:
                continue
            chunk = os.read(child.stdout.fileno(), _CHUNK_BYTES)
            if not chunk:
                break
            sql += chunk
            if len(sql) > _GLOBALS_LIMIT_BYTES:
                raise FinalError(
                    f"the globals are larger than {_GLOBALS_LIMIT_BYTES >> 20} MiB", step="writing the globals"
                )
        ended = child.wait(operation)
    if ended.exit_code != 0:
        raise FinalError(ended.how(), step="writing the globals")
    compressed = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(sql))
    store.put(f"{set_id.prefix}globals/{held.server.number if held.server else 0}.sql.zst", compressed, if_absent=True)
