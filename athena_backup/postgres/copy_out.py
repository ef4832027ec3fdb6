"""Bulk tables out by COPY, many at once, in one piece or in ranges, all under the cut's snapshot ("PostgreSQL", sections 1 and 2).

asyncpg hands out COPY's bytes in pieces of up to 256 KiB where libpq hands out rows, so it is the one that reads.
"""

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode

import asyncpg
from sqlalchemy import URL

from athena_backup.crew import Turn
from athena_backup.errors import AthenaError, FullError, PassingError, UnavailableError
from athena_backup.operation import LOOK_SECONDS, Operation
from athena_backup.pipeline import FRAME_BYTES, sliced
from athena_backup.postgres.bulk import BulkTable, TableRange
from athena_backup.postgres.held import LOCK_NOT_AVAILABLE, Held
from athena_backup.postgres.sessions import (
    APPLICATION_NAME,
    CONNECT_SECONDS,
    COUNTING_SETTINGS,
    READING_SETTINGS,
    client_encoding,
    translated_state,
)

_PIECE_BYTES = 768 << 10
"""Of COPY's bytes that the kernel gathers before it wakes a reading session: woken for each 150 KB, as many as lie there by
then, it spent 3 % of a backup's time in going round its loop.
"""
_PATIENCE_SECONDS = 0.003
"""After so long without a piece it takes what there is: a COPY ends, or a source is slow."""
_MISSES_LIMIT = 20
"""A source that has no large piece for so many times as long is slow: to look on would cost more than its small pieces."""
_REST_SECONDS = 5
"""So long a slow source is left alone."""
_LOCKED_LIMIT = 64
"""Tables whose locks a reading session keeps: `max_locks_per_transaction` is as many for each session by default."""
logger = logging.getLogger("athena_backup.postgres")

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


def unreachable(url: URL) -> str:
    """Why asyncpg can't log in where libpq could; empty if it can.

    Raises `UnavailableError` and its like where a login fails for now.
    """
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
    """Sessions under the snapshot of one database, each of which reads one table or range after the other.

    A new session for each would cost a start of a backend, and the server as many first looks at its shared buffers.
    """

    def __init__(self, held: Held, tables: Sequence[BulkTable]) -> None:
        """``tables``: those that are read, of which every session locks the first at its start: DDL that queues for one of
        them later waits, and does not come between two of its ranges.
        """
        self._held = held
        self._tables = tuple(tables[: _LOCKED_LIMIT // 2])
        self._lock = threading.Lock()
        self._idle: list[_CopySession] = []
        self._is_closed = False

    @contextlib.contextmanager
    def one(self, operation: Operation, turn: Turn) -> Iterator["_CopySession"]:
        """A session for one piece of work; it is kept for the next one only where nothing went wrong."""
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        one = kept or _CopySession(self._held, self._tables)
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

    def __init__(self, held: Held, tables: Sequence[BulkTable]) -> None:
        self._held = held
        self._tables = tables
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

        The thread that takes the blocks runs the driver's event loop between them: while it stores, the server fills the
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
                    # A row of hundreds of megabytes is not to be held several times.
                    yield from sliced(gathered.take(), FRAME_BYTES)
                    if is_ended:
                        break
                ended(int(copying.result().removeprefix("COPY ")))

    async def _copied(self, of: TableRange, gathered: "_Gathered") -> str:
        table, query = of.table, of.query
        with _large_pieces(self._connection._transport, gathered):  # noqa: SLF001 - it has no other way
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
            self._lock([table, *(one for one in self._tables if one != table)])
        except (asyncpg.LockNotAvailableError, asyncpg.OutOfMemoryError):
            # What DDL waits for may have been read whole by now, or be another session's; or the server has no room for more.
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


@contextlib.contextmanager
def _large_pieces(transport: Any, gathered: "_Gathered") -> Iterator[None]:
    """Have the driver get COPY's bytes in larger pieces: the socket is ready from `_PIECE_BYTES` on (socket(7), SO_RCVLOWAT).

    Whatever is not read by plain TCP is left as it is.
    """
    sock = transport.get_extra_info("socket")
    if not hasattr(transport, "max_size") or sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        yield
        return

    woken_from = 1

    def wake_from(size_bytes: int) -> None:
        nonlocal woken_from
        if size_bytes != woken_from:
            woken_from = size_bytes
            # OSError: of a connection that is broken by now, which its reader says better.
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)

    async def look() -> None:
        misses = 0
        while True:
            largest_bytes = gathered.forget_largest()
            if largest_bytes >= _PIECE_BYTES // 2:
                misses = 0
            elif not gathered.is_full:
                misses += 1
            if misses >= _MISSES_LIMIT:
                # It may be faster later: a table with many dead rows, a checkpoint.
                wake_from(1)
                await asyncio.sleep(_REST_SECONDS)
                misses = _MISSES_LIMIT // 2
            wake_from(_PIECE_BYTES if largest_bytes else 1)
            await asyncio.sleep(_PATIENCE_SECONDS)

    before_bytes, transport.max_size = transport.max_size, _PIECE_BYTES
    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        wake_from(1)
        transport.max_size = before_bytes


class _Gathered:
    """What the driver has handed out, until it is a frame's worth: to enter its loop for each piece would cost more than COPY."""

    def __init__(self) -> None:
        self._largest_bytes = 0
        self._pieces: list[bytes] = []
        self._size_bytes = 0
        self._is_full = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    async def put(self, piece: bytes) -> None:
        """Take a piece, once there is room for it: until then the driver does not read on."""
        await self._has_room.wait()
        self._largest_bytes = max(self._largest_bytes, len(piece))
        self._pieces.append(piece)
        self._size_bytes += len(piece)
        if self._size_bytes >= FRAME_BYTES:
            self._has_room.clear()
            self._is_full.set()

    @property
    def is_full(self) -> bool:
        """Whether the driver is not to read on."""
        return self._is_full.is_set()

    def forget_largest(self) -> int:
        """The size of the largest piece since the last call, in bytes; 0: none has come."""
        largest_bytes, self._largest_bytes = self._largest_bytes, 0
        return largest_bytes

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


def count_rows(sessions: CopySessions, table: BulkTable, operation: Operation, turn: Turn) -> int:
    """How many rows a table has under the snapshot: what its ranges have to add up to. A crew's work."""
    with sessions.one(operation, turn) as one:
        return one.count(table)
