"""The cut: one instant at which all databases of a server are read, held to the last byte ("PostgreSQL", section 1).

Two sessions hold each database. L locks every table (a snapshot does not protect against TRUNCATE and rewriting DDL);
then S takes the snapshot that `pg_dump` and every count import. The snapshots of one server are compared as texts and
taken again until they are equal: then no transaction lies between them.
"""

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy
from sqlalchemy import Connection, text

from athena_backup.errors import AthenaError, FinalError, PassingError
from athena_backup.manifest import Server
from athena_backup.operation import Operation
from athena_backup.postgres.held import Held, lock_tables, lost_holder, ping, tables_of, waiting_for
from athena_backup.postgres.sessions import (
    Database,
    cancelled_with,
    refuse_pooler,
    run_sql,
    session,
    translated,
)

LOCK_TIMEOUT_SECONDS = 60.0
SNAPSHOT_TRIES = 1_000
"""Under four writers flat out a try succeeds about one time in five (field notes), and takes a few milliseconds."""
TABLE_TRIES = 50
"""Under two sessions that make and drop tables flat out a try succeeds about one time in eight (tried)."""
_PING_SECONDS = 30.0
_LOOK_SECONDS = 1.0
_PAUSES_SECONDS = (2.0, 4.0, 8.0)
"""What failed for a reason that may pass is tried again after these: a server that starts anew, or has no connection free."""
_PATIENCE_SECONDS = 30.0
"""A database that took so long is not tried again: a lock time-out, a minute by default, would be multiplied, and DDL would wait
as long for what is locked in the others.
"""
# undefined_table and invalid_schema_name (manual, appendix A): dropped between our listing and our LOCK.
_VANISHED = ("42P01", "3F000")
logger = logging.getLogger("athena_backup.postgres")


@dataclass
class Cut:
    """All databases that could be held, and why the others couldn't."""

    held: Mapping[str, Held]
    faults: Mapping[str, AthenaError]
    servers: Sequence[Server] = ()
    spread_seconds: float = 0.0

    def of(self, name: str) -> Held:
        """The held database of a component; raises what kept it from being held, or what lost it.

        A fault that could have passed is final by now: nobody opens the database again under this cut.
        """
        if fault := self.faults.get(name):
            if not fault.passing:
                raise fault
            raise FinalError(
                fault.cause, next_step=fault.next_step, component=fault.component, step=fault.step
            ) from fault
        held = self.held[name]
        held.check()
        return held

    def release(self, name: str) -> None:
        """Let a component's database go, which nobody reads under the cut any more; nothing if it isn't held."""
        if name in self.held:
            self.held[name].release()


@dataclass
class _Opening:
    """The cut while it is being made."""

    stack: contextlib.ExitStack
    pauses: Iterator[float]
    """What is left of those between one try and the next."""
    held: dict[str, Held] = field(default_factory=dict)
    faults: dict[str, AthenaError] = field(default_factory=dict)
    sessions: dict[str, contextlib.ExitStack] = field(default_factory=dict)
    """Both sessions of each database, or as many of them as could be opened."""
    worked_seconds: dict[str, float] = field(default_factory=dict)

    def may_be_tried(self, name: str) -> bool:
        """Whether to open a database may succeed, for the first time or again."""
        fault = self.faults.get(name)
        return fault is None or (fault.passing and self.worked_seconds[name] < _PATIENCE_SECONDS)


@contextlib.contextmanager
def hold_cut(
    databases: Sequence[Database],
    operation: Operation,
    *,
    lock_timeout_seconds: float = LOCK_TIMEOUT_SECONDS,
    ddl_wait_limit_seconds: float | None = None,
    snapshot_tries: int = SNAPSHOT_TRIES,
) -> Iterator[Cut]:
    """Hold all ``databases`` at one instant per server while the block lasts.

    A database that can't be reached or locked, not even after some pauses, becomes a fault of its component; the others go on.
    After ``ddl_wait_limit_seconds`` of DDL queueing behind our locks, that database is given up. Raises what `Operation.check`
    does.
    """
    with contextlib.ExitStack() as stack:
        opening = _Opening(stack, iter(_PAUSES_SECONDS))
        while True:
            _open_each(databases, opening, lock_timeout_seconds, operation)
            _refuse_twins(opening)
            groups = _by_server([opening.held[one.name] for one in databases if one.name in opening.held])
            taken = [
                _take_snapshots(number, group, opening, lock_timeout_seconds, snapshot_tries, operation)
                for number, group in enumerate(groups)
            ]
            # Where one server's are taken again, those of the others are too: else the spread would grow by the pause.
            if not _waits_for_another_try(opening, operation):
                break
        servers = [server for server in taken if server is not None]
        instants = [server.consistent_at for server in servers]
        spread = (max(instants) - min(instants)).total_seconds() if instants else 0.0
        cut = Cut(opening.held, opening.faults, servers, spread)
        stopped = threading.Event()
        pinger = threading.Thread(
            target=_watch, args=(list(opening.held.values()), ddl_wait_limit_seconds, stopped), name="cut", daemon=True
        )
        pinger.start()
        try:
            yield cut
        finally:
            stopped.set()
            pinger.join()


def _open_each(
    databases: Sequence[Database], opening: _Opening, lock_timeout_seconds: float, operation: Operation
) -> None:
    """Open every database that may be and is not, until no pause is left: before any snapshot, which would hold back vacuum."""
    while True:
        for database in databases:
            operation.check()
            if database.name not in opening.held and opening.may_be_tried(database.name):
                opening.faults.pop(database.name, None)
                _collect(opening, database, lambda: _open(opening, database, lock_timeout_seconds, operation))  # noqa: B023 - at once
        if not _waits_for_another_try(opening, operation):
            return


def _waits_for_another_try(opening: _Opening, operation: Operation) -> bool:
    """Whether something that failed is to be tried again, after the pause that has been made; raises what `Operation.check` does."""
    failed = {name: fault for name, fault in opening.faults.items() if opening.may_be_tried(name)}
    pause_seconds = next(opening.pauses, None) if failed else None
    if pause_seconds is None:
        return False
    for name, fault in failed.items():
        logger.warning("database %s is not held yet, and tried again in %.0f s: %s", name, pause_seconds, fault)
    operation.pause(pause_seconds)
    return True


def _collect(opening: _Opening, database: Database, work: Callable[[], None]) -> None:
    began = time.monotonic()
    try:
        work()
    except AthenaError as error:
        opening.faults[database.name] = error
    except sqlalchemy.exc.DBAPIError as error:
        opening.faults[database.name] = translated(error)
    opening.worked_seconds[database.name] = opening.worked_seconds.get(database.name, 0) + time.monotonic() - began
    if database.name in opening.faults:
        _let_go(opening, database.name)


def _collect_each(opening: _Opening, group: list[Held], work: Callable[[Held], None]) -> None:
    """Do ``work`` for every database of the group; one whose work fails leaves the group as a fault."""
    for held in group:
        _collect(opening, held.database, lambda: work(held))  # noqa: B023 - called at once
    group[:] = [held for held in group if held.database.name in opening.held]


def _open(opening: _Opening, database: Database, lock_timeout_seconds: float, operation: Operation) -> None:
    sessions = opening.sessions[database.name] = opening.stack.enter_context(contextlib.ExitStack())
    held = Held(database, sessions.enter_context(_quiet(database)), sessions.enter_context(_quiet(database)))
    opening.held[database.name] = held
    refuse_pooler(held.locks)
    _lock_tables(held, lock_timeout_seconds, operation)


def _let_go(opening: _Opening, name: str) -> None:
    """What is not read holds no table, no snapshot and no connection, as long as the others may take."""
    held = opening.held.pop(name, None)
    if held is not None:
        held.release()
    if sessions := opening.sessions.pop(name, None):
        sessions.close()


@contextlib.contextmanager
def _quiet(database: Database) -> Iterator[Connection]:
    """A session whose loss, at the end, is no error of its own: whoever relied on it was told by `Held.check`."""
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(session(database.url))
        yield connection
        with contextlib.suppress(AthenaError, sqlalchemy.exc.SQLAlchemyError):
            stack.close()


def _lock_tables(held: Held, lock_timeout_seconds: float, operation: Operation) -> None:
    """Have L lock every table that it sees, in a new transaction, and keep what it saw; S's view is compared with that."""
    locks = held.locks
    for _ in range(TABLE_TRIES):
        run_sql(locks, "ROLLBACK")
        run_sql(locks, "BEGIN ISOLATION LEVEL READ COMMITTED")
        run_sql(locks, f"SET LOCAL lock_timeout = {int(lock_timeout_seconds * 1000)}")
        held.locked = tables_of(locks)
        try:
            with cancelled_with(locks, operation):
                lock_tables(locks, [name for _, _, name in held.locked])
        except sqlalchemy.exc.DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) in _VANISHED:
                continue
            problem = translated(error)
            if isinstance(problem, PassingError):
                raise PassingError(
                    f"a table lock was not granted within {lock_timeout_seconds:.0f} s: {problem.cause}",
                    next_step="some session alters or truncates a table, or waits to: let it end",
                    step="locking the tables",
                ) from error
            raise
        run_sql(locks, "SET LOCAL lock_timeout = 0")
        return
    raise PassingError(
        f"tables were dropped in each of {TABLE_TRIES} tries to lock them",
        next_step="back up when fewer tables are made and dropped",
        step="locking the tables",
    )


def _refuse_twins(opening: _Opening) -> None:
    twins = [
        names
        for names in itertools.combinations(opening.held, 2)
        if _are_one_database(*(opening.held[name] for name in names))
    ]
    for names in twins:
        for each in names:
            opening.faults[each] = FinalError(
                f"components {' and '.join(names)} are one and the same database",
                next_step="remove one from ATHENA_DATABASES",
            )
            _let_go(opening, each)


def _are_one_database(one: Held, other: Held) -> bool:
    """By the server's own identifier, or where a role of one of them may not read it by address and start time."""
    server, its = one.identity, other.identity
    if server.system_identifier and its.system_identifier:
        is_one_server = server.system_identifier == its.system_identifier
    else:
        is_one_server = (server.address, server.port, server.started) == (its.address, its.port, its.started)
    return is_one_server and one.oid == other.oid


def _by_server(all_held: Sequence[Held]) -> list[list[Held]]:
    groups: list[list[Held]] = []
    for held in all_held:
        for group in groups:
            if group[0].identity.same_server(held.identity):
                group.append(held)
                break
        else:
            groups.append([held])
    return groups


def _take_snapshots(
    number: int, group: list[Held], opening: _Opening, lock_timeout_seconds: float, tries: int, operation: Operation
) -> Server | None:
    """Take equal snapshots in all databases of a server; those that can't be read are dropped from it as faults."""
    for _ in range(TABLE_TRIES):
        exact = False
        for _ in range(tries):
            operation.check()
            _collect_each(opening, group, _begin_snapshot)
            # Nothing but the one statement that takes the snapshot stands between one database and the next.
            _collect_each(opening, group, _take_snapshot)
            if not group:
                return None
            texts = {held.snapshot_text for held in group}
            agree = all(held.identity.same_server(group[0].identity) for held in group)
            if len(group) == 1 or (len(texts) == 1 and agree and not group[0].identity.in_recovery):
                exact = True
                break
            if group[0].identity.in_recovery:
                break  # on a standby equal texts prove nothing (tried), so unequal ones need no second try
        if not exact and not group[0].identity.in_recovery:
            _give_up(
                group, opening, f"in {tries} tries no instant was found at which no transaction lay between databases"
            )
            return None
        _collect_each(opening, group, _look_at_tables)
        moved = [held for held in group if not held.stands_still]
        if group and not moved:
            return _describe(number, group, exact=exact)
        # A table was made or rewritten between L and S: lock again what there is now, and take new snapshots.
        _collect_each(opening, moved, lambda held: _lock_tables(held, lock_timeout_seconds, operation))
        group[:] = [held for held in group if held.database.name in opening.held]
    _give_up(group, opening, f"tables were made or rewritten in each of {TABLE_TRIES} tries to take a snapshot")
    return None


def _give_up(group: list[Held], opening: _Opening, why: str) -> None:
    for held in group:
        opening.faults[held.database.name] = PassingError(
            why, next_step="back up when less is written", step="taking the snapshots"
        )
        _let_go(opening, held.database.name)


def _begin_snapshot(held: Held) -> None:
    """Open S's transaction; its first query, not this, takes the snapshot (manual, "SET TRANSACTION")."""
    run_sql(held.reader, "ROLLBACK")
    run_sql(held.reader, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")


def _take_snapshot(held: Held) -> None:
    row = run_sql(
        held.reader,
        "SELECT pg_catalog.pg_current_snapshot()::text AS snapshot, pg_catalog.clock_timestamp() AS taken_at",
    ).one()
    held.snapshot_text, held.taken_at = row.snapshot, row.taken_at


def _look_at_tables(held: Held) -> None:
    """Find out whether S sees the very tables and files that L has locked.

    S locks none: 10,000 tables locked by L and by pg_dump are what a server's lock table takes as it comes (tried).
    """
    # What L sees by now is not enough: a table made after L's locking would be seen by both and locked by none.
    held.stands_still = held.locked == tables_of(held.reader) == tables_of(held.locks)
    if not held.stands_still:
        return
    held.snapshot = held.reader.execute(text("SELECT pg_catalog.pg_export_snapshot()")).scalar_one()


def _describe(number: int, group: Sequence[Held], *, exact: bool) -> Server:
    instants = [held.taken_at for held in group if held.taken_at is not None]
    one = group[0].identity
    url = group[0].database.url
    spread = (max(instants) - min(instants)).total_seconds()
    server = Server(
        number=number,
        host=url.host or one.address,
        port=url.port or one.port,
        version=one.version,
        system_identifier=one.system_identifier,
        in_recovery=one.in_recovery,
        consistent_at=max(instants),
        exact=exact,
        spread_seconds=0.0 if exact else spread,
    )
    for held in group:
        held.server = server
    return server


def _watch(all_held: Sequence[Held], ddl_wait_limit_seconds: float | None, stopped: threading.Event) -> None:
    """Keep the holders awake, see when one is lost, and give a database up for whose locks DDL has waited too long."""
    next_ping = time.monotonic() + _PING_SECONDS
    waiting_since: dict[tuple[str, int], float] = {}
    while not stopped.wait(_LOOK_SECONDS):
        is_time = time.monotonic() >= next_ping
        if is_time:
            next_ping = time.monotonic() + _PING_SECONDS
        for held in all_held:
            if held.lost is not None:
                continue
            try:
                # While a task reads through S, S is awake, and its socket readable for good reasons.
                if held.reader_lock.acquire(blocking=False):
                    try:
                        if is_time or held.is_readable():
                            ping(held.reader)
                            with held.locks_lock:
                                ping(held.locks)
                    finally:
                        held.reader_lock.release()
                elif is_time:
                    with held.locks_lock:
                        ping(held.locks)
                if ddl_wait_limit_seconds is not None:
                    _give_up_for_ddl(held, ddl_wait_limit_seconds, waiting_since)
            except sqlalchemy.exc.SQLAlchemyError as error:
                held.lost = held.lost or lost_holder(error)


def _give_up_for_ddl(held: Held, limit_seconds: float, waiting_since: dict[tuple[str, int], float]) -> None:
    # Timed here: an ordinary role sees neither statement nor times of others, and a wait's begin came with version 14.
    now, name = time.monotonic(), held.database.name
    waiting = dict(waiting_for(held))
    for key in [key for key in waiting_since if key[0] == name and key[1] not in waiting]:
        del waiting_since[key]
    late = [
        f"pid {pid}: {query}"
        for pid, query in waiting.items()
        if now - waiting_since.setdefault((name, pid), now) >= limit_seconds
    ]
    if late:
        held.lost = FinalError(
            f"given up after {limit_seconds:.0f} s because DDL waited for its locks: {'; '.join(late)}",
            next_step="run DDL outside of backups, or raise ATHENA_DDL_WAIT_SECONDS",
            step="holding the snapshot",
        )
        # Ended in the server: a task may be using the reader, and a connection is not for two threads at once.
        with held.locks_lock, contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):
            held.locks.execute(text("SELECT pg_catalog.pg_terminate_backend(:pid)"), {"pid": held.reader_pid})
            held.locks.invalidate()
