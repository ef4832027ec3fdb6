"""The two sessions that hold one database still while it is read ("PostgreSQL", section 1).

L keeps every table locked against TRUNCATE and rewriting DDL, S keeps the snapshot. When and how often they are opened,
and what their loss means, is the business of `cut`.
"""

import contextlib
import select
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg
import sqlalchemy
from psycopg.pq import ExecStatus, TransactionStatus
from sqlalchemy import Connection, text

from athena_backup.errors import AthenaError, FinalError, PassingError, UnavailableError
from athena_backup.operation import LOOK_SECONDS, Operation
from athena_backup.postgres.sessions import (
    Database,
    ServerIdentity,
    cancelled_with,
    identity,
    quoted,
    refuse_pooler,
    run_sql,
    session,
    translated,
)

CATALOG_SETTINGS = {"client_encoding": "UTF8"}
"""For sessions that read catalogs and counts but never rows: names arrive as text, in SQL_ASCII databases too."""

_LOCKED_AT_ONCE = 200
_LISTINGS = 10
_SNAPSHOT_SECONDS = 30.0
_UNDEFINED = ("42P01", "3F000")
_LOCK_NOT_AVAILABLE = "55P03"

# Tables whose rows a dump holds, and partitioned tables. Members of an extension are made by CREATE EXTENSION, unless
# the extension named them as its configuration (manual, "Extension Configuration Tables").
_RELATIONS = """
SELECT c.oid::bigint AS oid, c.relfilenode::bigint AS node, n.nspname AS schema_name, c.relname AS name,
       c.relkind::text AS kind, c.relpersistence = 'u' AS unlogged,
       EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
               AND d.objid = c.oid AND d.deptype = 'e') AS of_extension
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't'
  AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
ORDER BY n.nspname, c.relname
"""
_CONFIGURATION = "SELECT pg_catalog.unnest(extconfig)::bigint FROM pg_catalog.pg_extension"
_LOCKED = """
SELECT relation::bigint FROM pg_catalog.pg_locks
WHERE pid = pg_catalog.pg_backend_pid() AND locktype = 'relation' AND mode = 'AccessShareLock' AND granted
  AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
"""
# pg_locks shows everybody's waiting, pg_stat_activity other roles' statements only to the privileged.
_WAITING = """
SELECT DISTINCT l.pid, pg_catalog.left(coalesce(a.query, 'an unknown statement'), 200) AS statement
FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
WHERE NOT l.granted AND l.pid <> :pid AND :pid = ANY (pg_catalog.pg_blocking_pids(l.pid)) ORDER BY l.pid
"""
_IN_THE_WAY = """
SELECT DISTINCT l.pid, pg_catalog.left(coalesce(a.query, 'an unknown statement'), 200) AS statement
FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND l.pid <> pg_catalog.pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
ORDER BY l.pid LIMIT 5
"""
_SNAPSHOT = (
    b"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;"
    b"SELECT pg_catalog.pg_current_snapshot()::text, pg_catalog.pg_is_in_recovery(),"
    b" extract(epoch FROM pg_catalog.clock_timestamp())::text"
)


@dataclass(frozen=True)
class Relation:
    """A table or a partitioned table as a session sees it; ``node`` changes with every rewrite and TRUNCATE."""

    oid: int
    node: int
    schema_name: str
    name: str
    kind: str
    unlogged: bool
    of_extension: bool

    @property
    def sql(self) -> str:
        """Its name for SQL text."""
        return f"{quoted(self.schema_name)}.{quoted(self.name)}"


@dataclass(frozen=True)
class Waiting:
    """A session that waits for a lock, or stands in the way of one, and what it runs."""

    pid: int
    statement: str

    def __str__(self) -> str:
        return f"pid {self.pid}: {' '.join(self.statement.split())}"


@dataclass(frozen=True)
class Taken:
    """A snapshot that was just taken: its text, whether on a standby, and the server's clock."""

    text: str
    in_recovery: bool
    at: datetime


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """The driver's errors leave the block as this project's own."""
    try:
        yield
    except sqlalchemy.exc.DBAPIError as error:
        raise translated(error) from error
    except psycopg.Error as error:
        raise UnavailableError(f"PostgreSQL: {' '.join(str(error).split()) or type(error).__name__}") from error


def relations(connection: Connection) -> list[Relation]:
    """The tables whose rows a dump of the database holds, and the partitioned ones, in the order of their names."""
    configuration = set(connection.execute(text(_CONFIGURATION)).scalars())
    found = [
        Relation(row.oid, row.node, row.schema_name, row.name, row.kind, row.unlogged, row.of_extension)
        for row in connection.execute(text(_RELATIONS))
    ]
    return [relation for relation in found if not relation.of_extension or relation.oid in configuration]


def lock_relations(connection: Connection, wanted: list[Relation], *, nowait: bool = False) -> None:
    """Take ACCESS SHARE on each of ``wanted`` by name; raises `sqlalchemy.exc.DBAPIError`."""
    for start in range(0, len(wanted), _LOCKED_AT_ONCE):
        names = ", ".join(f"ONLY {relation.sql}" for relation in wanted[start : start + _LOCKED_AT_ONCE])
        run_sql(connection, f"LOCK TABLE {names} IN ACCESS SHARE MODE{' NOWAIT' if nowait else ''}")


def sqlstate(error: sqlalchemy.exc.DBAPIError) -> str:
    """The SQLSTATE of a driver's error, empty where it has none."""
    return getattr(error.orig, "sqlstate", None) or ""


class Holders:
    """L and S of one database. Every use takes the lock: a psycopg connection is not for two threads at once."""

    def __init__(self, database: Database, operation: Operation, lock_timeout_seconds: float) -> None:
        self.database = database
        self._operation = operation
        self._lock_timeout_ms = max(1, round(lock_timeout_seconds * 1000))
        self._stack = contextlib.ExitStack()
        self._use = threading.RLock()
        self._locker: Connection | None = None
        self._snapper: Connection | None = None
        self._locked: frozenset[int] = frozenset()
        self.identity: ServerIdentity | None = None
        self.oid = 0

    def open(self) -> None:
        """Open L and lock everything; raises an `AthenaError` that says what is in the way."""
        with self._use, ours():
            locker = self._enter()
            self._locker = locker
            self.identity = identity(locker)
            self.oid = locker.execute(
                text("SELECT oid::bigint FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()")
            ).scalar_one()
            self.lock()

    def _enter(self) -> Connection:
        connection = self._stack.enter_context(session(self.database.url, CATALOG_SETTINGS))
        refuse_pooler(connection)
        return connection

    def lock(self) -> None:
        """(Re)start L's transaction and lock every table that there is, also those that appear meanwhile."""
        with self._use, ours(), cancelled_with(self._l, self._operation):
            for _ in range(_LISTINGS):
                self._operation.check()
                try:
                    if self._lock_once():
                        return
                except sqlalchemy.exc.DBAPIError as error:
                    self._operation.check()
                    if sqlstate(error) == _LOCK_NOT_AVAILABLE:
                        raise self._refused(error) from error
                    if sqlstate(error) not in _UNDEFINED:  # a table went between listing and locking: list again
                        raise
        raise PassingError(
            "tables are created, dropped or renamed faster than they can be locked",
            next_step="back up when no schema changes run",
            step="locking",
        )

    def _lock_once(self) -> bool:
        _end_transaction(self._l)
        run_sql(self._l, "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY")
        run_sql(self._l, f"SET LOCAL lock_timeout = {self._lock_timeout_ms}")
        for _ in range(_LISTINGS):
            # By OID from pg_locks: a name may have come to mean another table between the listing and the lock.
            locked = frozenset(self._l.execute(text(_LOCKED)).scalars())
            missing = [relation for relation in relations(self._l) if relation.oid not in locked]
            if not missing:
                self._locked = locked
                run_sql(self._l, "SET LOCAL lock_timeout = 0")
                return True
            lock_relations(self._l, missing)
        return False

    def _refused(self, error: sqlalchemy.exc.DBAPIError) -> AthenaError:
        _end_transaction(self._l)
        ahead = [Waiting(row.pid, row.statement) for row in self._l.execute(text(_IN_THE_WAY))]
        who = "; ".join(str(one) for one in ahead) or str(error.orig)
        return PassingError(
            f"its tables could not be locked within {self._lock_timeout_ms / 1000:g} s, in the way: {who}",
            next_step="wait for that statement to end, or raise ATHENA_LOCK_TIMEOUT_SECONDS",
            step="locking",
        )

    def open_snapshot_session(self) -> None:
        """Open S, without a snapshot yet; raises `FinalError` if it landed on another server than L."""
        with self._use, ours():
            snapper = self._enter()
            found = identity(snapper)
            if self.identity is None or not found.same_server(self.identity) or found.started != self.identity.started:
                raise FinalError(
                    "two connections by the same URL reach two different servers",
                    next_step="name one server in the URL, not a balanced address",
                    step="connecting",
                )
            self._snapper = snapper

    def send_snapshot(self) -> None:
        """Ask S for a new snapshot without waiting, so that those of all databases are asked for at almost one instant."""
        with self._use, ours():
            if _driver(self._s).info.transaction_status != TransactionStatus.IDLE:
                run_sql(self._s, "ROLLBACK")
            connection = _driver(self._s).pgconn
            connection.send_query(_SNAPSHOT)
            connection.flush()

    def receive_snapshot(self) -> Taken:
        """The snapshot that `send_snapshot` asked for."""
        with self._use, ours():
            connection = _driver(self._s).pgconn
            deadline = time.monotonic() + _SNAPSHOT_SECONDS
            values: list[bytes] | None = None
            while True:
                while connection.is_busy():
                    self._operation.check()
                    if time.monotonic() > deadline:
                        raise UnavailableError("the server does not answer", step="taking the snapshot")
                    connection.flush()
                    select.select([connection.socket], [], [], LOOK_SECONDS)
                    connection.consume_input()
                result = connection.get_result()
                if result is None:
                    break
                if result.status == ExecStatus.TUPLES_OK:
                    values = [result.get_value(0, column) or b"" for column in range(3)]
                elif result.status != ExecStatus.COMMAND_OK:
                    message = (result.error_message or b"").decode("utf-8", "replace")
                    raise UnavailableError(f"PostgreSQL: {' '.join(message.split())}", step="taking the snapshot")
            if values is None:
                raise UnavailableError("the server gave no snapshot", step="taking the snapshot")
            return Taken(values[0].decode(), values[1] == b"t", datetime.fromtimestamp(float(values[2]), UTC))

    def is_covered(self) -> bool:
        """Whether L protects everything that S sees: each table locked, and no other file under it than S knows.

        A table that L sees and S doesn't was created after the snapshot; it is no part of the backup.
        """
        with self._use, ours():
            now = {(relation.oid, relation.node) for relation in relations(self._l)}
            return all(
                relation.oid in self._locked and (relation.oid, relation.node) in now for relation in relations(self._s)
            )

    def export(self) -> str:
        """Export S's snapshot; the identifier works as long as S lives."""
        with self._use, ours():
            name: str = self._s.execute(text("SELECT pg_catalog.pg_export_snapshot()")).scalar_one()
            return name

    def ping(self) -> None:
        """Raise `AthenaError` unless both sessions answer."""
        with self._use, ours():
            for connection in (self._l, self._s):
                connection.execute(text("SELECT 1")).scalar_one()
                if _driver(connection).info.transaction_status != TransactionStatus.INTRANS:
                    raise UnavailableError("a holder's transaction has ended")

    def waiting(self) -> list[Waiting]:
        """The sessions that wait for a lock which L holds."""
        with self._use, ours():
            pid = _driver(self._l).info.backend_pid
            return [Waiting(row.pid, row.statement) for row in self._l.execute(text(_WAITING), {"pid": pid})]

    def sockets(self) -> list[int]:
        """The descriptors of both sessions: one that becomes readable while idle has ended, or is about to."""
        with self._use:
            connections = [one for one in (self._locker, self._snapper) if one is not None]
            return [_driver(one).fileno() for one in connections if not _driver(one).closed]

    def close(self) -> None:
        """End both sessions; may be called again."""
        with self._use:
            for connection in (self._locker, self._snapper):
                if connection is not None:
                    # Thrown away rather than reset: the far end may be gone, and a closed session holds nothing.
                    with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError, psycopg.Error):
                        connection.invalidate()
            self._locker = self._snapper = None
            with contextlib.suppress(AthenaError):
                self._stack.close()

    @property
    def _l(self) -> Connection:
        if self._locker is None:
            raise UnavailableError("the session that holds the locks is closed")
        return self._locker

    @property
    def _s(self) -> Connection:
        if self._snapper is None:
            raise UnavailableError("the session that holds the snapshot is closed")
        return self._snapper


def _driver(connection: Connection) -> "psycopg.Connection[tuple[object, ...]]":
    driver = connection.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        raise TypeError("holders are sessions of psycopg")
    return driver


def _end_transaction(connection: Connection) -> None:
    if _driver(connection).info.transaction_status != TransactionStatus.IDLE:
        run_sql(connection, "ROLLBACK")
