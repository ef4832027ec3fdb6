"""Bulk tables out and in by COPY, many at once, the biggest in ranges, all under the cut's snapshot ("PostgreSQL", 2 and 4).

`pg_dump` reads everything else, and makes no data of these. asyncpg hands out COPY's bytes in pieces of up to 256 KiB where
libpq hands out rows, so it is the one that reads; a load is the server's work, so any driver will do.
"""

import asyncio
import contextlib
import logging
import os
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlencode

import asyncpg
from sqlalchemy import URL, Connection, text

from athena_backup.crew import Turn
from athena_backup.errors import AthenaError, DamagedError, FinalError, FullError, PassingError, UnavailableError
from athena_backup.manifest import Stream, TableData
from athena_backup.operation import LOOK_SECONDS, Operation
from athena_backup.pipeline import FRAME_BYTES, read_ahead, read_stream
from athena_backup.postgres.held import LOCK_NOT_AVAILABLE, Held
from athena_backup.postgres.order import order_dependent_tables, rerouted_partitions
from athena_backup.postgres.sessions import (
    APPLICATION_NAME,
    CONNECT_SECONDS,
    COUNTING_SETTINGS,
    READING_SETTINGS,
    Database,
    cancelled_with,
    client_encoding,
    driver_of,
    quoted,
    run_sql,
    session,
    translated_state,
)
from athena_backup.store import Store

BULK_BYTES = 16 << 20
"""Tables from this size on are taken out of the dump, which one process reads and one loads."""
DUMP_BYTES = 256 << 20
"""Where the dump would have to hold more than this, smaller tables are taken out of it too, the biggest first."""
_SMALLEST_BYTES = 1 << 20
"""A COPY of its own for less costs more than it saves."""
RANGE_BYTES = 128 << 20
"""About how much of a table one COPY reads: the last one of a backup keeps a core busy alone for some two seconds."""
_TABLES_LIMIT = 1_000
"""pg_dump is told of each by a pattern in its command line."""
_RANGES_LIMIT = 1_000
_CTID_SCAN_SINCE = 140_000
_LOCKED_LIMIT = 64
"""Tables whose locks a reading session keeps: `max_locks_per_transaction` is as many for each session by default."""
# Escapes in identifiers, in any encoding of the server (release notes of 13); of SQL_ASCII no character is known, and the names
# of EUC_TW are not read in that encoding.
_ESCAPES_SINCE = 130_000
_PIECE_BYTES = 256 << 10
# Written pages go to the disk while there is time, not all at once when the replaced database is dropped (a checkpoint).
LOADING_SETTINGS = {"synchronous_commit": "off", "backend_flush_after": "256"}
_STREAM_NAME = re.compile(r"tables/(\d+)\.")
logger = logging.getLogger("athena_backup.postgres")

# Types whose binary form is the same in every version since 10 and depends on no setting but client_encoding; of all others
# (and of what extensions bring) only the text is sure to be read by a newer server.
_BINARY_TYPES = (
    *(
        "bool",
        "bytea",
        "int2",
        "int4",
        "int8",
        "float4",
        "float8",
        "numeric",
        "text",
        "varchar",
        "bpchar",
        "uuid",
        "json",
    ),
    *("jsonb", "date", "time", "timetz", "timestamp", "timestamptz", "interval", "inet", "cidr", "macaddr", "macaddr8"),
)
# Ordinary tables that pg_dump would read, but members of extensions: of those it reads what the extension says.
_TABLES = text(
    "SELECT c.oid::bigint AS oid, n.nspname AS schema_name, c.relname AS name,"
    " pg_catalog.pg_table_size(c.oid)::bigint AS size_bytes,"
    " (pg_catalog.pg_relation_size(c.oid) / pg_catalog.current_setting('block_size')::bigint)::bigint AS blocks,"
    " coalesce(m.amname OPERATOR(pg_catalog.=) 'heap', false) AS is_heap,"
    " ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a WHERE a.attrelid OPERATOR(pg_catalog.=) c.oid"
    " AND a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped AND a.attgenerated OPERATOR(pg_catalog.=) ''"
    " ORDER BY a.attnum) AS columns,"
    " NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) a.atttypid"
    # Only true arrays: an int2vector has elements too, and is refused in binary when it is empty (tried).
    " LEFT JOIN pg_catalog.pg_type e ON e.oid OPERATOR(pg_catalog.=) t.typelem AND e.typarray OPERATOR(pg_catalog.=) t.oid"
    " WHERE a.attrelid OPERATOR(pg_catalog.=) c.oid"
    " AND a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped AND a.attgenerated OPERATOR(pg_catalog.=) ''"
    " AND NOT (coalesce(e.typnamespace, t.typnamespace) OPERATOR(pg_catalog.=) 'pg_catalog'::pg_catalog.regnamespace"
    " AND coalesce(e.typname, t.typname) OPERATOR(pg_catalog.=) ANY (CAST(:binary AS name[])))) AS is_binary"
    " FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"
    " LEFT JOIN pg_catalog.pg_am m ON m.oid OPERATOR(pg_catalog.=) c.relam"
    " WHERE c.relkind OPERATOR(pg_catalog.=) 'r' AND c.oid OPERATOR(pg_catalog.=) ANY (CAST(:oids AS oid[]))"
    " AND (pg_catalog.pg_table_size(c.oid) OPERATOR(pg_catalog.>=) CAST(:bulk AS bigint)"
    " OR c.oid OPERATOR(pg_catalog.=) ANY (CAST(:dependent AS oid[])))"
    # A standby has nothing of these (manual, 27.4.2).
    " AND NOT (c.relpersistence OPERATOR(pg_catalog.=) 'u' AND pg_catalog.pg_is_in_recovery())"
    " AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.objid OPERATOR(pg_catalog.=) c.oid"
    " AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_class'::pg_catalog.regclass"
    " AND d.deptype OPERATOR(pg_catalog.=) 'e')"
    " ORDER BY c.oid OPERATOR(pg_catalog.=) ANY (CAST(:dependent AS oid[])) DESC, size_bytes DESC, c.oid LIMIT :limit"
)
# Of libpq's parameters, those that asyncpg knows by the same name (asyncpg manual, "Connection").
_SHARED_PARAMETERS = frozenset(
    {
        "host",
        "port",
        "passfile",
        "sslmode",
        "sslcert",
        "sslkey",
        "sslrootcert",
        "sslcrl",
        "ssl_min_protocol_version",
        "ssl_max_protocol_version",
        "target_session_attrs",
    }
)


# What libpq takes from the environment and asyncpg does not (libpq, 34.15).
_UNKNOWN_VARIABLES = frozenset(
    {"PGCHANNELBINDING", "PGREQUIREAUTH", "PGREQUIREPEER", "PGSSLCERTMODE", "PGSSLCRLDIR", "PGSSLNEGOTIATION"}
)


@dataclass(frozen=True)
class BulkTable:
    """A table that is read by COPY."""

    oid: int
    schema_name: str
    name: str
    columns: tuple[str, ...]
    is_binary: bool
    blocks: int
    """Of the table's own file, without what is stored out of line."""
    size_bytes: int
    can_be_split: bool

    @property
    def format(self) -> Literal["binary", "text"]:
        """Which of COPY's forms it is read in."""
        return "binary" if self.is_binary else "text"

    @property
    def full_name(self) -> str:
        """The name for use in SQL; of pg_dump's patterns it matches this table alone ("pg_dump", Notes)."""
        return f"{quoted(self.schema_name)}.{quoted(self.name)}"

    @property
    def ascii_name(self) -> str:
        """The name for a session whose driver writes its SQL in UTF-8, whatever its client_encoding is."""
        return f"{_ascii_quoted(self.schema_name)}.{_ascii_quoted(self.name)}"

    @property
    def is_ascii(self) -> bool:
        """Whether the names of table and columns are plain ASCII."""
        return all(name.isascii() for name in (self.schema_name, self.name, *self.columns))

    def ranges(self, range_bytes: int) -> list["TableRange"]:
        """The pieces in which it is read; together they have every block that it has or may yet get."""
        count = min(-(-self.size_bytes // range_bytes), self.blocks, _RANGES_LIMIT) if self.can_be_split else 1
        bounds = [number * self.blocks // max(count, 1) for number in range(1, count)]
        return [
            TableRange(self, number, first, last, self.size_bytes // max(count, 1))
            for number, (first, last) in enumerate(zip([None, *bounds], [*bounds, None], strict=True))
        ]


@dataclass(frozen=True)
class TableRange:
    """The blocks of a table from ``first`` up to, and without, ``last``; None: no bound on that side."""

    table: BulkTable
    number: int
    first: int | None
    last: int | None
    size_bytes: int

    @property
    def stream_name(self) -> str:
        """File name of its stream inside the component's folder."""
        return f"tables/{self.table.oid}.{self.number:04}.{'bin' if self.table.is_binary else 'txt'}.zst"

    @property
    def query(self) -> str | None:
        """What selects its rows; None where it is the whole table, which COPY reads cheaper as such."""
        table, columns = self.table, ", ".join(map(_ascii_quoted, self.table.columns))
        if self.first is None and self.last is None and table.is_ascii:
            return None
        bounds = [f"ctid >= '({self.first},0)'"] if self.first is not None else []
        bounds += [f"ctid < '({self.last},0)'"] if self.last is not None else []
        where = f" WHERE {' AND '.join(bounds)}" if bounds else ""
        return f"SELECT {columns} FROM ONLY {table.ascii_name}{where}"  # noqa: S608 - quoted

    def data(self, rows: int) -> TableData:
        """What the manifest says of the range."""
        return TableData(
            schema_name=self.table.schema_name,
            name=self.table.name,
            columns=self.table.columns,
            format=self.table.format,
            rows=rows,
        )


def table_oid(stream: Stream) -> int | None:
    """The OID that the table of a stream had when it was read, as the stream's name has it; None if it has none."""
    found = _STREAM_NAME.match(stream.name)
    return int(found[1]) if found else None


def bulk_tables(held: Held, *, all_bytes: int = 0, bulk_bytes: int = BULK_BYTES) -> list[BulkTable]:
    """The tables of a held database, which holds ``all_bytes``, that are worth a COPY of their own, the biggest first.

    Behind them, in the order of their names, stand those that have to be loaded last, however small they are. None where the
    driver of the copies can't reach the database as libpq does (an exotic login): pg_dump reads it then, alone and slower, and
    the log says so. Raises SQLAlchemy's errors, and `UnavailableError` and its like where a login fails for now.
    """
    if reason := _unreachable(held.database.url):
        logger.warning("%s is read by pg_dump alone, not by parallel COPY: %s", held.database.name, reason)
        return []
    # L holds the locks that looking at sizes takes; S would have to wait behind DDL that waits for L.
    with held.locks_lock:
        rerouted = rerouted_partitions(held.locks)
        locked = {oid for oid, _, _ in held.locked}
        dependent = [oid for oid in order_dependent_tables(held.locks) if oid in locked]
        parameters = {
            "oids": [oid for oid in locked if oid not in rerouted],
            "bulk": min(bulk_bytes, _SMALLEST_BYTES),
            "dependent": dependent,
            "limit": _TABLES_LIMIT,
            "binary": list(_BINARY_TYPES),
        }
        rows = held.locks.execute(_TABLES, parameters).all()
    found = [
        BulkTable(
            row.oid,
            row.schema_name,
            row.name,
            tuple(row.columns),
            row.is_binary,
            row.blocks,
            row.size_bytes,
            row.is_heap and held.identity.version >= _CTID_SCAN_SINCE,
        )
        for row in rows
        if row.columns
    ]
    encoding = driver_of(held.reader).info.parameter_status("server_encoding")
    can_be_named = held.identity.version >= _ESCAPES_SINCE and encoding not in ("SQL_ASCII", "EUC_TW")
    named = {table.oid: table for table in found if can_be_named or table.is_ascii}
    last = [named.pop(oid) for oid in dependent if oid in named]
    worth = worth_copying(list(named.values()), all_bytes, bulk_bytes)
    # Where pg_dump writes all others, or one that should come last, it knows best in which order.
    return [*worth, *last] if worth and len(last) == len(dependent) else []


def worth_copying(tables: Sequence[BulkTable], all_bytes: int, bulk_bytes: int) -> list[BulkTable]:
    """Those that don't belong into the dump: of ``bulk_bytes`` or more, and as many as leave it no more than it should hold."""
    worth: list[BulkTable] = []
    for table in sorted(tables, key=lambda one: -one.size_bytes):
        if table.size_bytes < bulk_bytes and all_bytes <= DUMP_BYTES:
            break
        worth.append(table)
        all_bytes -= table.size_bytes
    return worth


def _unreachable(url: URL) -> str:
    """Why asyncpg can't log in where libpq could; empty if it can."""
    if unknown := sorted(url.query.keys() - _SHARED_PARAMETERS):
        return f"its driver does not know {', '.join(unknown)}"
    if unknown := sorted(name for name in os.environ if name in _UNKNOWN_VARIABLES):
        return f"its driver does not know {', '.join(unknown)}"
    if "system" in (url.query.get("sslrootcert"), os.environ.get("PGSSLROOTCERT")):
        return "its driver does not know sslrootcert=system, and would not verify the server"

    async def try_it() -> None:
        connection = await _connect(url)
        await connection.close(timeout=CONNECT_SECONDS)

    try:
        # In a thread of its own: whoever calls may stand in an event loop.
        with ThreadPoolExecutor(1, "copy") as pool:
            pool.submit(lambda: asyncio.run(try_it())).result()
    except asyncpg.PostgresError as error:
        problem = translated_state(error.sqlstate or "", str(error))
        if isinstance(problem, PassingError | UnavailableError | FullError):
            raise problem from error  # not of the login's kind: the next try may get in
        return f"its driver can't log in: {error}"
    # RuntimeError: of a login by GSSAPI without its library; ValueError: of parameters.
    except (OSError, TimeoutError, RuntimeError, ValueError, asyncpg.InterfaceError) as error:
        return f"its driver can't log in: {error or type(error).__name__}"
    return ""


async def _connect(url: URL) -> Any:
    ours = {name: url.query[name] for name in url.query if name not in ("host", "port")}
    host, port = url.host or url.query.get("host"), url.port or url.query.get("port")
    connection = await asyncpg.connect(
        f"postgresql://?{urlencode(ours)}",
        host=list(host) if isinstance(host, tuple) else host,
        port=[int(one) for one in port] if isinstance(port, tuple) else port and int(port),
        user=url.username,
        password=url.password,
        database=url.database,
        timeout=CONNECT_SECONDS,
        statement_cache_size=0,
        server_settings={"application_name": APPLICATION_NAME},
    )
    _keep_alive(connection._transport.get_extra_info("socket"))  # noqa: SLF001 - it has no other way
    return connection


def _keep_alive(sock: Any) -> None:
    """As in all other sessions (`sessions.session`): a connection that is cut without a word is noticed."""
    if sock is None or sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 30),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 60_000),
    ):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class CopySessions:
    """Sessions under the snapshot of one database, each of which reads one range after the other.

    A new session for every range would cost a start of a backend, and the server as many first looks at its shared buffers.
    """

    def __init__(self, held: Held, split: Sequence[BulkTable]) -> None:
        """``split``: the tables that are read in ranges, which every session locks at its start: DDL that queues for one
        later can't come between two of its ranges.
        """
        self._held = held
        self._split = tuple(split[:_LOCKED_LIMIT])
        self._lock = threading.Lock()
        self._idle: list[_CopySession] = []
        self._is_closed = False

    @contextlib.contextmanager
    def one(self, operation: Operation, turn: Turn) -> Iterator["_CopySession"]:
        """A session for one piece of work; it is kept for the next one only where nothing went wrong."""
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        one = kept or _CopySession(self._held, self._split)
        one.begin(operation, turn)
        is_whole = False
        try:
            yield one
            is_whole = True
        finally:
            with self._lock:
                is_kept = is_whole and not self._is_closed
                if is_kept:
                    self._idle.append(one)
            if not is_kept:
                one.close()

    def close(self) -> None:
        """End all sessions; those that are in use end with their work."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for one in idle:
            one.close()


class _CopySession:
    """A connection of asyncpg's and the event loop that it belongs to; for one thread at a time."""

    def __init__(self, held: Held, split: Sequence[BulkTable]) -> None:
        self._held = held
        self._split = split
        self._runner = asyncio.Runner()
        # A connection that breaks tells so in the call that needs it; what the loop has to add is no more than that.
        self._runner.get_loop().set_exception_handler(lambda _, context: logger.debug("%s", context.get("message")))
        self._connection: Any = None
        self._locked: set[int] = set()
        self._check: Callable[[], None] = held.check

    def begin(self, operation: Operation, turn: Turn) -> None:
        """Whom the next calls have to stop for."""

        def check() -> None:
            operation.check()
            self._held.check()
            turn.check()

        self._check = check

    def close(self) -> None:
        """End the connection without a word: its transaction has only read."""
        if self._connection is not None:
            self._connection.terminate()
        self._runner.close()

    def count(self, table: BulkTable) -> int:
        """How many rows a table has."""
        with self._told(table):
            self._enter(table)
            working = self._started(self._connection.fetchval(f"SELECT count(*) FROM ONLY {table.ascii_name}"))  # noqa: S608 - quoted
            with self._stopping(working):
                while not working.done():
                    self._check()
                    self._runner.run(_done_or_later(working))
                return int(working.result())

    def copy(self, of: TableRange, ended: Callable[[int], None]) -> Iterator[bytes]:
        """A range's bytes in blocks of about a frame; ``ended`` is called with the number of rows behind the last one.

        The thread that takes the blocks runs the driver's event loop between them: while it compresses, the server fills the
        socket's buffer, and when that is full, waits.
        """
        with self._told(of.table):
            self._enter(of.table)
            gathered = _Gathered()
            copying = self._started(self._copied(of, gathered))
            with self._stopping(copying):
                while True:
                    self._check()
                    is_ended = self._runner.run(gathered.filled(copying))
                    yield from _sliced(gathered.take())
                    if is_ended:
                        break
                ended(int(copying.result().removeprefix("COPY ")))

    async def _copied(self, of: TableRange, gathered: "_Gathered") -> str:
        table, query = of.table, of.query
        if query is None:
            status: str = await self._connection.copy_from_table(
                table.name,
                schema_name=table.schema_name,
                columns=table.columns,
                format=table.format,
                output=gathered.put,
            )
        else:
            status = await self._connection.copy_from_query(query, format=table.format, output=gathered.put)
        return status

    def _started(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        async def started() -> "asyncio.Task[Any]":
            return asyncio.create_task(work)

        return self._runner.run(started())

    @contextlib.contextmanager
    def _stopping(self, working: "asyncio.Task[Any]") -> Iterator[None]:
        try:
            yield
        finally:
            if not working.done():
                # The server is told, and its answer awaited for a moment: a COPY that nobody reads would hold its lock.
                working.cancel()
                self._runner.run(_settled(working))

    def _enter(self, table: BulkTable) -> None:
        """See to it that the session is under the snapshot and has the table's lock."""
        self._check()
        if self._connection is None:
            self._connection = self._runner.run(_connect(self._held.database.url))
            self._runner.run(self._set_up())
        if table.oid in self._locked:
            return
        if self._locked and len(self._locked) < _LOCKED_LIMIT:
            self._lock([table])
            return
        self._import_snapshot()
        try:
            self._lock([table, *(one for one in self._split if one != table)])
        except asyncpg.LockNotAvailableError:
            # What DDL waits for may have been read whole by now, or be another session's.
            self._import_snapshot()
            self._lock([table])

    async def _set_up(self) -> None:
        encoding = await self._connection.fetchval("SELECT pg_catalog.current_setting('server_encoding')")
        settings = {
            **READING_SETTINGS,
            "client_encoding": client_encoding(encoding),
            "jit": "off",
            "max_parallel_workers_per_gather": "0",
            **COUNTING_SETTINGS,
        }
        known = "SELECT pg_catalog.set_config(name, $2, false) FROM pg_catalog.pg_settings WHERE name OPERATOR(pg_catalog.=) $1"
        for name, value in settings.items():
            await self._connection.fetch(known, "DateStyle" if name == "datestyle" else name, value)

    def _import_snapshot(self) -> None:
        """Begin a transaction under the cut's snapshot, without any lock."""
        self._locked.clear()
        for statement in (
            "ROLLBACK",  # only a warning where there is nothing to be ended
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
            f"SET TRANSACTION SNAPSHOT '{self._held.snapshot}'",
        ):
            self._runner.run(self._connection.execute(statement))

    def _lock(self, tables: Sequence[BulkTable]) -> None:
        names = ", ".join(f"ONLY {table.ascii_name}" for table in tables)
        self._runner.run(self._connection.execute(f"LOCK TABLE {names} IN ACCESS SHARE MODE NOWAIT"))
        self._locked.update(table.oid for table in tables)

    @contextlib.contextmanager
    def _told(self, table: BulkTable) -> Iterator[None]:
        """The driver's errors as this project's own, with the table's name."""
        try:
            yield
        except asyncpg.PostgresError as error:
            self._check()
            self._held.prove()
            if error.sqlstate == LOCK_NOT_AVAILABLE:
                raise self._held.refused_lock() from error
            raise _named(table, translated_state(error.sqlstate or "", str(error))) from error
        # InternalClientError: of a connection that was ended in the middle of a message.
        except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError) as error:
            self._check()
            self._held.prove()
            raise _named(table, UnavailableError(f"PostgreSQL: {error or type(error).__name__}")) from error


def _named(table: BulkTable, problem: AthenaError) -> AthenaError:
    problem.cause = f"reading {table.full_name}: {problem.cause}"
    problem.step = "copying"
    return problem


class RangeReading:
    """One COPY of a range as a `Source`'s chunks; ``rows`` is known when they have ended."""

    def __init__(self, sessions: CopySessions, of: TableRange, turn: Turn) -> None:
        self._sessions = sessions
        self._of = of
        self._turn = turn
        self.rows = 0

    def chunks(self, operation: Operation) -> Iterator[bytes]:
        """COPY's bytes; raises `FinalError` for a lock that is refused, `PassingError` for a broken connection."""
        with self._sessions.one(operation, self._turn) as one:
            yield from one.copy(self._of, self._end)

    def _end(self, rows: int) -> None:
        self.rows = rows


class _Gathered:
    """What the driver has handed out, until it is a frame's worth: to enter its loop for each piece would cost more than COPY."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size_bytes = 0
        self._is_full = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    async def put(self, piece: bytes) -> None:
        """Take a piece, once there is room for it: until then the driver does not read on."""
        await self._has_room.wait()
        self._pieces.append(piece)
        self._size_bytes += len(piece)
        if self._size_bytes >= FRAME_BYTES:
            self._has_room.clear()
            self._is_full.set()

    async def filled(self, copying: "asyncio.Task[str]") -> bool:
        """Wait for a frame's worth, or the end, or until it is time to look around; returns whether it was the end."""
        full = asyncio.create_task(self._is_full.wait())
        await asyncio.wait({full, copying}, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        full.cancel()
        return copying.done()

    def take(self) -> bytes:
        """Everything that has come, in one piece."""
        block = b"".join(self._pieces)
        self._pieces.clear()
        self._size_bytes = 0
        self._is_full.clear()
        self._has_room.set()
        return block


async def _settled(working: "asyncio.Task[Any]") -> None:
    await asyncio.wait({working}, timeout=5)


async def _done_or_later(working: "asyncio.Task[Any]") -> None:
    await asyncio.wait({working}, timeout=LOOK_SECONDS)


def _sliced(block: bytes) -> Iterator[bytes]:
    """A block, in pieces of a frame if it is far larger: a row of hundreds of megabytes is not to be held several times."""
    if len(block) <= 2 * FRAME_BYTES:
        if block:
            yield block
        return
    view = memoryview(block)
    for start in range(0, len(block), FRAME_BYTES):
        yield bytes(view[start : start + FRAME_BYTES])


def _ascii_quoted(identifier: str) -> str:
    """An identifier as ASCII text, with escapes that the server turns into its own encoding (manual, 4.1.2.3)."""
    if identifier.isascii():
        return quoted(identifier)
    escaped = "".join(
        character if character.isascii() and character != "\\" else f"\\+{ord(character):06X}"
        for character in identifier
    )
    return "U&" + quoted(escaped)


def count_rows(sessions: CopySessions, table: BulkTable, operation: Operation, turn: Turn) -> int:
    """How many rows a table has under the snapshot: what its ranges have to add up to. A crew's work."""
    with sessions.one(operation, turn) as one:
        return one.count(table)


def load_ranges(
    component: str,
    streams: Sequence[Stream],
    target: Database,
    store: Store,
    operation: Operation,
    turn: Turn,
    *,
    are_all: bool,
) -> None:
    """Load some of a staged table's streams, one after the other, in one transaction; ``are_all`` says that it has no others.

    A table that is loaded so is emptied first, so that its rows can be written as frozen: nothing has to be written a second
    time when somebody first reads them (COPY, FREEZE). Raises `DamagedError` for other bytes or another number of rows than the
    manifest promises, and the driver's errors translated.
    """
    with session(target.url, LOADING_SETTINGS) as connection, cancelled_with(connection, operation):
        run_sql(connection, "BEGIN")
        for number, stream in enumerate(streams):
            data = stream.table
            if data is None:
                raise FinalError(f"{stream.name} holds no table's rows")
            if are_all and number == 0:
                run_sql(connection, f"TRUNCATE ONLY {_full_name(data)}")
            statement = copy_statement(data, *(["FREEZE"] if are_all else []))
            pieces = read_ahead(_gathered(read_stream(component, stream.parts, store, operation)))
            with contextlib.closing(pieces):
                rows = _copy_in(connection, statement, pieces, turn)
            if rows != data.rows:
                raise DamagedError(
                    f"{_full_name(data)} got {rows} rows from {stream.name}, the manifest promises {data.rows}",
                    step="loading",
                )
        run_sql(connection, "COMMIT")


def _copy_in(connection: Connection, statement: str, pieces: Iterator[bytes], turn: Turn) -> int:
    driver = driver_of(connection)
    with driver.cursor() as cursor:
        with cursor.copy(statement.encode(driver.info.encoding)) as copy:
            for piece in pieces:
                turn.check()
                copy.write(piece)
        return cursor.rowcount


def _full_name(data: TableData) -> str:
    return f"{quoted(data.schema_name)}.{quoted(data.name)}"


def copy_statement(data: TableData, *options: str) -> str:
    """The COPY that loads a stream of rows."""
    columns = ", ".join(map(quoted, data.columns))
    how = ", ".join([f"FORMAT {data.format}", *options])
    return f"COPY {_full_name(data)} ({columns}) FROM STDIN ({how})"


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Small pieces joined: each one that is handed on costs the driver the same."""
    waiting: list[bytes] = []
    size_bytes = 0
    for piece in pieces:
        waiting.append(piece)
        size_bytes += len(piece)
        if size_bytes >= _PIECE_BYTES:
            yield b"".join(waiting)
            waiting.clear()
            size_bytes = 0
    if waiting:
        yield b"".join(waiting)


def rows_of(streams: Sequence[Stream]) -> dict[tuple[str, str], int]:
    """How many rows the streams of each table hold together, by schema and name."""
    rows: Counter[tuple[str, str]] = Counter()
    for data in (stream.table for stream in streams if stream.table is not None):
        rows[data.schema_name, data.name] += data.rows
    return dict(rows)
