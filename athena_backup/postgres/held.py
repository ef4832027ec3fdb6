"""One database of the cut: the two sessions that hold it, how their loss is seen, and who waits for their locks.

`cut` makes these and watches over them; whoever reads under the snapshot goes through `Held.reader` or imports its snapshot.
"""

import contextlib
import select
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime

import psycopg
import sqlalchemy
from sqlalchemy import Connection, text

from athena_backup.errors import AthenaError, FinalError
from athena_backup.manifest import Server
from athena_backup.operation import Operation
from athena_backup.postgres.sessions import (
    Database,
    ServerIdentity,
    cancelled_with,
    identity,
    refuse_older,
    refuse_several_servers,
    run_sql,
    session,
    translated,
)

# What pg_dump reads: of an extension's own tables only those that it names as configuration. The others CREATE EXTENSION
# makes anew, and an ordinary owner may have no right to so much as lock them.
_TABLES = text(
    "SELECT c.oid::bigint AS oid, c.relfilenode::bigint AS file, pg_catalog.format('%I.%I', n.nspname, c.relname) AS name"
    " FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"
    " WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND n.nspname <> 'information_schema'"
    " AND n.nspname !~ '^pg_' AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d"
    " JOIN pg_catalog.pg_extension e ON e.oid OPERATOR(pg_catalog.=) d.refobjid"
    " WHERE d.objid OPERATOR(pg_catalog.=) c.oid AND d.deptype OPERATOR(pg_catalog.=) 'e'"
    " AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_class'::pg_catalog.regclass"
    " AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_extension'::pg_catalog.regclass"
    " AND NOT coalesce(c.oid OPERATOR(pg_catalog.=) ANY (e.extconfig), false)) ORDER BY c.oid"
)
_ENUM_LABELS = text("SELECT oid::bigint, enumlabel FROM pg_catalog.pg_enum")
# Those that somebody made, without the tables' own and all arrays, whose names go with those of others.
_TYPES = text(
    "SELECT t.oid::bigint, pg_catalog.format('%I.%I', n.nspname, t.typname),"
    " ARRAY(SELECT pg_catalog.format('%s %s %s', a.attnum, a.atttypid, a.attisdropped) FROM pg_catalog.pg_attribute a"
    " WHERE a.attrelid OPERATOR(pg_catalog.=) c.oid AND c.relkind OPERATOR(pg_catalog.=) 'c'"
    " AND a.attnum OPERATOR(pg_catalog.>) 0 ORDER BY a.attnum)"
    " FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) t.typnamespace"
    " LEFT JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) t.typrelid"
    " WHERE t.oid OPERATOR(pg_catalog.>=) CAST(16384 AS oid) AND t.typcategory OPERATOR(pg_catalog.<>) 'A'"
    " AND (c.oid IS NULL OR c.relkind OPERATOR(pg_catalog.=) 'c')"
)
LOCK_NOT_AVAILABLE = "55P03"
_LOCKS_PER_STATEMENT = 500
_RELEASE_SECONDS = 2
Table = tuple[int, int, str]
"""A table as a holder sees it: OID, file node, quoted name."""


class Held:
    """One database of the cut: its exported snapshot, and the two sessions that keep it readable."""

    def __init__(self, database: Database, locks: Connection, reader: Connection) -> None:
        self.database = database
        self.locks = locks
        self.reader = reader
        self.identity: ServerIdentity = identity(locks)
        refuse_older(self.identity.version)
        refuse_several_servers(self.identity, identity(reader))
        self.oid: int = locks.execute(
            text(
                "SELECT oid::bigint FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) current_database()"
            )
        ).scalar_one()
        self.locks_pid: int = locks.execute(text("SELECT pg_catalog.pg_backend_pid()")).scalar_one()
        self.reader_pid: int = reader.execute(text("SELECT pg_catalog.pg_backend_pid()")).scalar_one()
        self.locked: list[Table] = []
        self.snapshot_text = ""
        self.stands_still = False
        self.snapshot = ""
        self.taken_at: datetime | None = None
        self.server: Server | None = None
        self.lost: AthenaError | None = None
        self.defective: set[int] = set()
        """OIDs of tables of which an index has been seen to be defective: none of them is to be read by an index."""
        self.locks_lock = threading.Lock()
        self.reader_lock = threading.Lock()
        """psycopg's sessions are for one thread at a time; whoever reads through S holds this."""

    def check(self) -> None:
        """Raise if a holder was lost: nothing that is read from now on belongs to the cut."""
        if self.lost is not None:
            raise self.lost

    def release(self) -> None:
        """End both transactions: nobody reads this database any more, and what waits for its tables may go on.

        Other databases of the cut are held as before; this one can't be read under it again.
        """
        self.lost = self.lost or FinalError("its part of the cut has ended", step="holding the snapshot")
        for connection, lock in ((self.locks, self.locks_lock), (self.reader, self.reader_lock)):
            # Whoever is left in it, hanging, keeps it until the cut's end.
            if lock.acquire(timeout=_RELEASE_SECONDS):
                try:
                    with contextlib.suppress(AthenaError, sqlalchemy.exc.SQLAlchemyError):
                        run_sql(connection, "ROLLBACK")
                finally:
                    lock.release()

    def prove(self) -> None:
        """Raise unless both holders answer at this moment: then all that was read under them until now is whole."""
        self.check()
        try:
            with self.locks_lock:
                ping(self.locks)
            with self.reader_lock:
                ping(self.reader)
        except sqlalchemy.exc.SQLAlchemyError as error:
            self.lost = self.lost or lost_holder(error)
        self.check()

    def prove_names(self) -> None:
        """Raise `FinalError` unless every name still means what it meant at the cut.

        A schema, a type or an enum's value can be renamed, and a composite type altered, under all table locks: readers that go
        by name, `pg_dump` among them, then read another table, or write a value that nobody knows, and notice nothing (tried).
        """
        self.check()
        try:
            with self.locks_lock:
                tables, labels = tables_of(self.locks), set(self.locks.execute(_ENUM_LABELS).tuples())
                types = _types(self.locks)
            with self.reader_lock:
                old_labels = set(self.reader.execute(_ENUM_LABELS).tuples())
                old_types = _types(self.reader)
        except sqlalchemy.exc.SQLAlchemyError as error:
            self.lost = self.lost or lost_holder(error)
            raise self.lost from error
        renamed = [name for _, _, name in sorted(set(self.locked) - set(tables))]
        # Of a type that is gone no table has a value: all that could have one are locked.
        still_there = {oid for oid, _ in labels}
        renamed += [f"the enum value {label!r}" for oid, label in sorted(old_labels - labels) if oid in still_there]
        renamed += [
            f"the type {name}"
            for oid, (name, form) in old_types.items()
            if types.get(oid, (name, form)) != (name, form)
        ]
        if renamed:
            raise FinalError(
                f"something was renamed while the database was read: {', '.join(renamed[:5])}",
                next_step="back up again, and rename schemas, types and enum values, or alter types, outside of backups",
                step="reading",
            )

    def is_readable(self) -> bool:
        """Whether the server sent something on an idle session of ours: it does so when it ends one."""
        poll = select.poll()
        for connection in (self.locks, self.reader):
            driver = connection.connection.driver_connection
            if not isinstance(driver, psycopg.Connection) or driver.closed:
                return True
            poll.register(driver.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def refused_lock(self) -> FinalError:
        """The error for a table lock that was refused, with whoever waits in front of us."""
        waiting = "; ".join(self.waiting()) or "whoever waited is gone by now"
        return FinalError(
            f"a table lock was refused: {waiting}", next_step="run DDL outside of backups", step="locking the tables"
        )

    def waiting(self) -> list[str]:
        """The statements that wait for our locks, with their pids; DDL, as nothing else conflicts with them.

        Empty where a lost holder can't be asked any more.
        """
        with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):
            return [f"pid {pid} waits with {query!r}" for pid, query in waiting_for(self)]
        return []


def tables_of(connection: Connection) -> list[Table]:
    """Every table that has to be held still; raises SQLAlchemy's errors."""
    return [(row.oid, row.file, row.name) for row in connection.execute(_TABLES)]


def lock_tables(connection: Connection, names: Sequence[str], how: str = "") -> None:
    """Lock tables against what a snapshot doesn't protect from; ``how``: NOWAIT. Raises SQLAlchemy's errors."""
    for start in range(0, len(names), _LOCKS_PER_STATEMENT):
        some = ", ".join(f"ONLY {name}" for name in names[start : start + _LOCKS_PER_STATEMENT])
        run_sql(connection, f"LOCK TABLE {some} IN ACCESS SHARE MODE {how}")


@contextlib.contextmanager
def snapshot_session(
    held: Held, operation: Operation, settings: Mapping[str, str] | None = None
) -> Iterator[Callable[[Sequence[str]], Connection]]:
    """A session of its own under the snapshot of the cut, given by the call that locks some tables, and them alone, for reading.

    The call raises `FinalError` where DDL waits for one of them: whoever came behind it would wait for L's end, and that for him.
    """
    try:
        with session(held.database.url, settings) as connection, cancelled_with(connection, operation):

            def locking(tables: Sequence[str]) -> Connection:
                run_sql(connection, "ROLLBACK")
                run_sql(connection, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                run_sql(connection, f"SET TRANSACTION SNAPSHOT '{held.snapshot}'")
                try:
                    lock_tables(connection, tables, "NOWAIT")
                except sqlalchemy.exc.DBAPIError as error:
                    if getattr(error.orig, "sqlstate", None) == LOCK_NOT_AVAILABLE:
                        raise held.refused_lock() from error
                    raise
                return connection

            yield locking
    except AthenaError:
        # A cancelled operation cancels the query in the server, and a lost holder's snapshot is gone: that is what to tell.
        operation.check()
        held.prove()
        raise


def ping(connection: Connection) -> None:
    """Have the server answer something; raises SQLAlchemy's errors where it doesn't."""
    connection.execute(text("SELECT 1")).scalar_one()


def _types(connection: Connection) -> dict[int, tuple[str, list[str]]]:
    """Every type's quoted name and, of a composite one, its attributes, by OID."""
    return {oid: (name, list(form)) for oid, name, form in connection.execute(_TYPES)}


def lost_holder(error: sqlalchemy.exc.SQLAlchemyError) -> FinalError:
    """What a failed ping means for everything that is read under the holder."""
    cause = translated(error).cause if isinstance(error, sqlalchemy.exc.DBAPIError) else str(error)
    return FinalError(
        f"a session that held the snapshot was lost: {cause}",
        next_step="find out who ended it; the next backup starts anew",
        step="holding the snapshot",
    )


def waiting_for(held: Held) -> list[tuple[int, str]]:
    """Who waits for the holder's locks: pid and statement; raises SQLAlchemy's errors."""
    # pg_locks shows everybody's waiting; pg_stat_activity shows the statements of others to the privileged only.
    statement = text(
        "SELECT DISTINCT l.pid, coalesce(a.query, 'an unknown statement') FROM pg_catalog.pg_locks l"
        " LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid OPERATOR(pg_catalog.=) l.pid"
        " WHERE NOT l.granted AND :pid OPERATOR(pg_catalog.=) ANY (pg_catalog.pg_blocking_pids(l.pid)) ORDER BY 1"
    )
    with held.locks_lock:
        # What others do is looked at once in a transaction, and this one is long.
        held.locks.execute(text("SELECT pg_catalog.pg_stat_clear_snapshot()"))
        rows = held.locks.execute(statement, {"pid": held.locks_pid}).all()
    return [(row[0], " ".join(row[1].split())[:200]) for row in rows]
