"""Side databases and the switch: how a staged database takes the live one's name, by OID, in one transaction.

PostgreSQL cuts identifiers at 63 bytes and RENAME is transactional; both facts decide what stands here ("PostgreSQL",
sections 5 and 6). Nothing here is ever addressed with IF EXISTS, and nothing is renamed or dropped whose OID is not known.
"""

import contextlib
import hashlib
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import sqlalchemy
from sqlalchemy import URL, Connection, text

from athena_backup.errors import AthenaError, FinalError, PassingError
from athena_backup.operation import Operation
from athena_backup.postgres.sessions import Database, cancelled_with, quoted, run_sql, session

IDENTIFIER_LIMIT_BYTES = 63
_NAME_LIMIT_BYTES = 30
# Cutting at a character, of at most 4 bytes, leaves 27 bytes at least.
_AMBIGUOUS_FROM_BYTES = _NAME_LIMIT_BYTES - 3
_HASH_DIGITS = 6
_SIDE_NAME = re.compile(r"__athena_([rb])_([0-9a-f]{12})$")
_MAINTENANCE_DATABASES = ("postgres", "template1")
_RENAME_TRIES = 5
_TERMINATE_EVERY_SECONDS = 0.05
_FENCE_SECONDS = 30

Side = Literal["r", "b"]
"""``r``: what a restore is building; ``b``: what was live before it."""


def side_name(database: str, side: Side, restore_id: str) -> str:
    """The name of a side database: the own name cut to 30 bytes at a character, then 12 hex digits that end the name.

    They are the restore's, or, where another database's name could be cut to the same, half of them a hash of the whole
    name: two databases of one server never share a side name.
    """
    name = f"{_cut(database)}__athena_{side}_{_digits(database, restore_id)}"
    if len(name.encode()) > IDENTIFIER_LIMIT_BYTES or not _SIDE_NAME.search(name):
        raise FinalError(f"{name!r} can't be the name of a side database")
    return name


def _cut(database: str) -> str:
    return database.encode()[:_NAME_LIMIT_BYTES].decode("utf-8", "ignore")


def _digits(database: str, restore_id: str) -> str:
    if len(database.encode()) < _AMBIGUOUS_FROM_BYTES:
        return restore_id
    return _hash(database) + restore_id[: 12 - _HASH_DIGITS]


def _hash(database: str) -> str:
    return hashlib.sha256(database.encode()).hexdigest()[:_HASH_DIGITS]


@contextlib.contextmanager
def maintenance_session(url: URL) -> Iterator[Connection]:
    """A session in another database of ``url``'s server, from which databases can be created, renamed and dropped.

    Raises what the connection raises when none of the usual maintenance databases can be entered.
    """
    errors = []
    for name in _MAINTENANCE_DATABASES:
        if name == url.database:
            continue
        manager = session(url.set(database=name))
        try:
            connection = manager.__enter__()
        except AthenaError as error:
            errors.append(error)
            continue
        with contextlib.ExitStack() as stack:
            stack.push(manager)
            yield connection
        return
    raise errors[0] if errors else FinalError(f"no maintenance database for {url.database}")


def database_oid(connection: Connection, name: str) -> int | None:
    """The OID of a database of the server, None where there is none of that name."""
    statement = text("SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) :name")
    oid: int | None = connection.execute(statement, {"name": name}).scalar_one_or_none()
    return oid


def drop_database(connection: Connection, name: str, oid: int) -> None:
    """Drop the database that has this name *and* this OID; raises `FinalError` if the name has another one by now."""
    found = database_oid(connection, name)
    if found is None:
        return
    if found != oid:
        raise FinalError(f"database {name} has OID {found}, not {oid}: it is not the one that was made, and it is kept")
    # What was a template before it was replaced still is one, and no template can be dropped.
    is_template = text("SELECT datistemplate FROM pg_catalog.pg_database WHERE oid OPERATOR(pg_catalog.=) :oid")
    if connection.execute(is_template, {"oid": oid}).scalar_one():
        run_sql(connection, f"ALTER DATABASE {quoted(name)} IS_TEMPLATE false")
    run_sql(connection, f"DROP DATABASE {quoted(name)} WITH (FORCE)")


def side_databases(connection: Connection, database: str, restore_id: str | None = None) -> dict[str, int]:
    """The side databases that this restore of ``database`` (with None: any restore) has left, with their OIDs.

    Only the holder of the slot may drop them: a living restore's are among them.
    """
    rows = connection.execute(
        text("SELECT datname, oid FROM pg_catalog.pg_database WHERE datname ~ '__athena_[rb]_[0-9a-f]{12}$'")
    )
    return {row.datname: row.oid for row in rows if _is_side_of(row.datname, database, restore_id)}


def _is_side_of(name: str, database: str, restore_id: str | None) -> bool:
    found = _SIDE_NAME.search(name)
    if found is None or name[: found.start()] != _cut(database):
        return False
    if restore_id is not None:
        return found.group(2) == _digits(database, restore_id)
    return len(database.encode()) < _AMBIGUOUS_FROM_BYTES or found.group(2).startswith(_hash(database))


def subscriptions_of(connection: Connection, database: str) -> list[str]:
    """The names of a database's subscriptions, as any role may read them from any database of the server."""
    statement = text(
        "SELECT s.subname FROM pg_catalog.pg_subscription s JOIN pg_catalog.pg_database d"
        " ON d.oid OPERATOR(pg_catalog.=) s.subdbid WHERE d.datname OPERATOR(pg_catalog.=) :name ORDER BY 1"
    )
    return [str(name) for name in connection.execute(statement, {"name": database}).scalars()]


def replication_bound_to(connection: Connection, database: str) -> list[str]:
    """The logical slots of a database and its subscriptions, in words: they would go, or be left without an end, with it."""
    slots = text("SELECT slot_name FROM pg_catalog.pg_replication_slots WHERE database OPERATOR(pg_catalog.=) :name")
    return [
        *(f"replication slot {one}" for one in connection.execute(slots, {"name": database}).scalars()),
        *(f"subscription {one}" for one in subscriptions_of(connection, database)),
    ]


def forget_subscriptions(url: URL, names: Sequence[str]) -> None:
    """Drop the subscriptions of a side database, which could not be dropped with them, without a word to their publishers.

    Their slots are not the side database's: it shares them with the one that it was restored from or replaced by.
    """
    with session(url) as inside:
        for name in names:
            run_sql(inside, f"ALTER SUBSCRIPTION {quoted(name)} DISABLE")
            run_sql(inside, f"ALTER SUBSCRIPTION {quoted(name)} SET (slot_name = NONE)")
            run_sql(inside, f"DROP SUBSCRIPTION {quoted(name)}")


@dataclass(frozen=True)
class Switched:
    """What a switch did: the name that the replaced database has now, None where there was none."""

    live_oid: int
    before_name: str | None


def switch_database(
    database: Database, staged_oid: int, restore_id: str, namespace: str, operation: Operation
) -> Switched:
    """Give the staged database the live name, and what was live its side name, in one transaction.

    Clients of the live database are disconnected, wait for about 0.3 s, and find the new one. Raises `PassingError` when
    sessions kept coming back through all tries, `FinalError` when the staged database is not the one with this OID; the
    live database is untouched then.
    """
    for attempt in range(1, _RENAME_TRIES + 1):
        operation.check()
        try:
            # A session of its own for every try: where one was lost in the middle, the next sees whether it had committed.
            with maintenance_session(database.url) as connection:
                _fence(connection, namespace, operation)
                return _switch(connection, database, staged_oid, restore_id, operation)
        except AthenaError as error:
            operation.check()  # a cancelled operation cancels RENAME in the server: that is no failure of it
            if not error.passing or attempt == _RENAME_TRIES:
                raise
    raise AssertionError("the loop above returns or raises")


def _switch(
    connection: Connection, database: Database, staged_oid: int, restore_id: str, operation: Operation
) -> Switched:
    staged_name = side_name(database.database, "r", restore_id)
    before_name = side_name(database.database, "b", restore_id)
    live_oid = database_oid(connection, database.database)
    if live_oid == staged_oid:  # a repeated call: the switch was done and only its answer was lost
        return Switched(staged_oid, before_name)
    if database_oid(connection, staged_name) != staged_oid:
        raise FinalError(f"{staged_name} is not the database that was staged: somebody replaced it")
    with _terminating(database.url, [database.database, staged_name]), cancelled_with(connection, operation):
        _rename(connection, database.database, live_oid, staged_name, before_name)
    return Switched(staged_oid, before_name if live_oid is not None else None)


def _rename(connection: Connection, live: str, live_oid: int | None, staged: str, before: str) -> None:
    # In autocommit, so BEGIN and COMMIT are said here: both renames in one transaction, or none.
    run_sql(connection, "BEGIN")
    try:
        if live_oid is not None:
            run_sql(connection, f"ALTER DATABASE {quoted(live)} RENAME TO {quoted(before)}")
            # Preflight asked, but hours may have passed. From here on nobody comes in who could make another one.
            if bound := replication_bound_to(connection, before):
                raise FinalError(
                    f"while it was restored, database {live} got what would be lost with it: {', '.join(bound[:5])}",
                    next_step="drop it first, restore again, and make it again after that",
                )
        run_sql(connection, f"ALTER DATABASE {quoted(staged)} RENAME TO {quoted(live)}")
        run_sql(connection, "COMMIT")
    except BaseException:
        # On a lost session SQLAlchemy refuses even this, with an error of another kind that would hide the first.
        with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):
            run_sql(connection, "ROLLBACK")
        raise


def _fence(connection: Connection, namespace: str, operation: Operation) -> None:
    """Take the namespace's advisory lock: whoever renames holds it, so a process believed dead can't (design.md, 6)."""
    deadline = time.monotonic() + _FENCE_SECONDS
    statement = text("SELECT pg_catalog.pg_try_advisory_lock(pg_catalog.hashtext(:name), 1)")
    while not connection.execute(statement, {"name": f"athena-backup {namespace}"}).scalar_one():
        if time.monotonic() > deadline:
            raise PassingError("another process of this service is renaming databases of this server")
        operation.pause(0.2)


@contextlib.contextmanager
def _terminating(url: URL, names: list[str]) -> Iterator[None]:
    """While the block lasts, end every session in the named databases again and again: RENAME waits for them to go."""
    stopped = threading.Event()
    statement = text(
        "SELECT count(*) FROM (SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity"
        # Not the server's own, such as autovacuum's workers: RENAME ends those, and only a superuser may, so one of them would
        # keep all others from being ended.
        " WHERE datname OPERATOR(pg_catalog.=) ANY (:names) AND pid <> pg_catalog.pg_backend_pid() AND usesysid IS NOT NULL) AS ended"
    )

    def terminate() -> None:
        # What this role may not terminate was found by preflight; here RENAME's own error is the one to report.
        while not stopped.is_set():
            with contextlib.suppress(AthenaError), maintenance_session(url) as connection:
                while not stopped.wait(_TERMINATE_EVERY_SECONDS):
                    connection.execute(statement, {"names": names})
            stopped.wait(_TERMINATE_EVERY_SECONDS)

    terminator = threading.Thread(target=terminate, name="terminate-sessions", daemon=True)
    terminator.start()
    try:
        yield
    finally:
        stopped.set()
        terminator.join()
