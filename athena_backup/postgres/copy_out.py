"""Bulk tables out by COPY, many at once, in one piece or in ranges, all under the cut's snapshot ("PostgreSQL", sections 1 and 2).

asyncpg hands out COPY's bytes in pieces where libpq hands out rows, so it is the one that reads (`copy_pieces`, `copy_login`).
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, cast

import asyncpg

from athena_backup.crew import Turn
from athena_backup.errors import AthenaError, PassingError, UnavailableError
from athena_backup.operation import LOOK_SECONDS, Operation
from athena_backup.postgres.bulk import BulkTable, TableRange
from athena_backup.postgres.copy_login import connect
from athena_backup.postgres.copy_pieces import Gathered, large_pieces
from athena_backup.postgres.copy_places import CopyPlaces
from athena_backup.postgres.held import LOCK_NOT_AVAILABLE, Held
from athena_backup.postgres.session_settings import (
    COUNTING_SETTINGS,
    READING_SETTINGS,
    SET_THOSE_KNOWN,
    client_encoding,
)
from athena_backup.postgres.sessions import translated_state

_LOCKED_LIMIT = 64
"""Tables whose locks a reading session keeps: `max_locks_per_transaction` is as many for each session by default."""
_SETTLING_SECONDS = 5
_DEFECTS = ("XX", "58")
"""Classes of the errors for what is corrupt or missing (manual, appendix A)."""
# What `COUNTING_SETTINGS` say of scans, turned round, and back.
_BY_INDEX = "SET enable_indexscan TO on; SET enable_seqscan TO off"
_BY_TABLE = "SET enable_indexscan TO off; SET enable_seqscan TO on"
logger = logging.getLogger("athena_backup.postgres")


class CopySessions:
    """Sessions under the snapshot of one database, each of which reads one table or range after the other.

    A new session for each would cost a start of a backend, and the server as many first looks at its shared buffers.
    """

    def __init__(self, held: Held, tables: Sequence[BulkTable], places: CopyPlaces | None = None) -> None:
        """``tables``: those that are read, of which every session locks the first at its start: DDL that queues for one of
        them later waits, and does not come between two of its ranges. ``places``: those of the operation; none: one.
        """
        self._held = held
        self._tables = tuple(tables[: _LOCKED_LIMIT // 2])
        self._places = places or CopyPlaces(1)

    @contextlib.contextmanager
    def one(self, operation: Operation, turn: Turn) -> Iterator["_CopySession"]:
        """A session for one piece of work; it is kept for the next one only where nothing went wrong."""
        one = cast("_CopySession | None", self._places.take(self))
        is_whole = False
        try:
            if one is None:
                one = _CopySession(self._held, self._tables)
            one.begin(operation, turn)
            yield one
            is_whole = True
        finally:
            self._places.give_back(self, one, is_whole=is_whole)

    def close(self) -> None:
        """End all sessions; those that are in use end with their work."""
        self._places.close(self)


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
        self._locked_limit = _LOCKED_LIMIT
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
        with self._told(of.table, by_key=of.by_key):
            self._enter(of.table)
            gathered = Gathered()
            copying = self._started(self._copied(of, gathered))
            with self._stopping(copying):
                while True:
                    self._check()
                    is_ended = self._runner.run(gathered.filled(copying))
                    yield from gathered.take()
                    if is_ended:
                        break
                ended(int(copying.result().removeprefix("COPY ")))

    async def _copied(self, of: TableRange, gathered: "Gathered") -> str:
        table, query = of.table, of.query
        with large_pieces(self._connection._transport, gathered):  # noqa: SLF001 - it has no other way
            if query is None:
                status: str = await self._connection.copy_from_table(
                    table.name,
                    schema_name=table.schema_name,
                    columns=table.columns,
                    format=table.format,
                    output=gathered.put,
                )
            else:
                if of.by_key:
                    await self._connection.execute(_BY_INDEX)
                status = await self._connection.copy_from_query(query, format=table.format, output=gathered.put)
                if of.by_key:
                    await self._connection.execute(_BY_TABLE)
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
                self._runner.run(_settled(working, self._connection))

    def _enter(self, table: BulkTable) -> None:
        """See to it that the session is under the snapshot and has the table's lock."""
        self._check()
        if self._connection is None:
            self._connection = self._runner.run(connect(self._held.database.url))
            self._runner.run(self._set_up())
        if table.oid in self._locked:
            return
        try:
            if self._locked and len(self._locked) < self._locked_limit:
                self._lock([table])
                return
            self._import_snapshot()
            self._lock([table, *(one for one in self._tables if one != table)][: self._locked_limit])
        except asyncpg.LockNotAvailableError:
            if self._locked:
                raise
            # What DDL waits for may have been read whole by now, or be another session's.
            self._import_snapshot()
            self._lock([table])
        except asyncpg.OutOfMemoryError:
            # The server has no room for more: from now on the session keeps the one lock that it needs.
            self._locked_limit = 1
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
        known = SET_THOSE_KNOWN.format("unnest($1::pg_catalog.text[], $2::pg_catalog.text[]) AS known (name, value)")
        await self._connection.fetch(known, list(settings), list(settings.values()))

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
    def _told(self, table: BulkTable, *, by_key: bool = False) -> Iterator[None]:
        """The driver's errors as this project's own, with the table's name; ``by_key``: an index is read too."""
        try:
            yield
        except asyncpg.PostgresError as error:
            self._check()
            self._held.prove()
            if error.sqlstate == LOCK_NOT_AVAILABLE:
                raise self._held.refused_lock() from error
            if by_key and (error.sqlstate or "").startswith(_DEFECTS):
                self._held.defective.add(table.oid)
                problem = PassingError(
                    f"an index may be defective: {error}", next_step=f"REINDEX TABLE {table.full_name}"
                )
                logger.warning("%s: %s; the next try reads the table without it", table.full_name, problem)
                raise _named(table, problem) from error
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


async def _settled(working: "asyncio.Task[Any]", connection: Any) -> None:
    await asyncio.wait({working}, timeout=_SETTLING_SECONDS)
    # The request to the server is a task of the driver's own: it would end with the connection, before it is sent.
    if requests := set(connection._cancellations):  # noqa: SLF001 - it has no other way
        await asyncio.wait(requests, timeout=_SETTLING_SECONDS)


async def _done_or_later(working: "asyncio.Task[Any]") -> None:
    await asyncio.wait({working}, timeout=LOOK_SECONDS)


def count_rows(sessions: CopySessions, table: BulkTable, operation: Operation, turn: Turn) -> int:
    """How many rows a table has under the snapshot: what its ranges have to add up to. A crew's work."""
    with sessions.one(operation, turn) as one:
        return one.count(table)
