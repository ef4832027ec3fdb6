"""The cut: one instant over all databases of a server, held to the end, or a fault that says why not."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from relays import refusing_pooler, relayed

from athena_backup.errors import AthenaError, CancelledError, FinalError
from athena_backup.operation import Operation
from athena_backup.postgres import cut as cut_module
from athena_backup.postgres import held as held_module
from athena_backup.postgres.cut import hold_cut
from athena_backup.postgres.embedded import EmbeddedServer, embedded_server
from athena_backup.postgres.held import Held
from athena_backup.postgres.sessions import Database


@contextlib.contextmanager
def made_databases(postgres: EmbeddedServer, count: int) -> Iterator[list[Database]]:
    names = [f"cut_{uuid4().hex[:10]}" for _ in range(count)]
    with connected(postgres, "postgres") as admin:
        for name in names:
            admin.execute(f"CREATE DATABASE {name}")
        yield [Database(f"c{number}", postgres.url(name)) for number, name in enumerate(names)]
        for name in names:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def connected(postgres: EmbeddedServer, database: str, **options: str) -> "psycopg.Connection[tuple[object, ...]]":
    defaults = {"host": "127.0.0.1", "port": str(postgres.port), "dbname": database, "user": "postgres"}
    return psycopg.connect(make_conninfo(**{**defaults, **options}), autocommit=True)


def await_true(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        threading.Event().wait(0.02)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is tried as often as ever, without a wait between."""
    monkeypatch.setattr(cut_module, "_PAUSES_SECONDS", (0.0, 0.0, 0.0))


class Interrupted(Operation):
    """An operation in whose pauses something happens; it waits no longer than that takes and ``wait_seconds`` besides."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None, wait_seconds: float = 0) -> None:
        super().__init__()
        self.pauses: list[float] = []
        self._meanwhile = meanwhile
        self._wait_seconds = wait_seconds

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self._meanwhile()
        super().pause(self._wait_seconds)


def scalar(postgres: EmbeddedServer, database: Database, snapshot: str, sql: str) -> object:
    with connected(postgres, database.database) as reader:
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        reader.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
        row = reader.execute(sql).fetchone()
        assert row is not None
        return row[0]


def test_databases_of_one_server_are_cut_at_one_instant_while_writers_write_across_them(
    postgres: EmbeddedServer,
) -> None:
    with made_databases(postgres, 2) as databases:
        for database in databases:
            with connected(postgres, database.database) as one:
                one.execute("CREATE TABLE t (n bigint)")
        stop = threading.Event()

        def write() -> None:
            with connected(postgres, databases[0].database) as a, connected(postgres, databases[1].database) as b:
                number = 0
                while not stop.is_set():
                    number += 1
                    a.execute("INSERT INTO t VALUES (%s)", (number,))
                    b.execute("INSERT INTO t VALUES (%s)", (number,))

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(5):
                with hold_cut(databases, Operation()) as cut:
                    assert not cut.faults
                    assert cut.servers[0].exact
                    assert cut.servers[0].spread_seconds == 0
                    first, second = (
                        scalar(postgres, one, cut.of(one.name).snapshot, "SELECT coalesce(max(n), 0) FROM t")
                        for one in databases
                    )
                # What the second has, the first had before it; and it was never more than one row ahead.
                assert isinstance(first, int)
                assert isinstance(second, int)
                assert first - 1 <= second <= first
        finally:
            stop.set()
            writer.join()


def test_truncate_and_a_rewriting_alter_wait_until_the_cut_is_let_go(postgres: EmbeddedServer) -> None:
    with made_databases(postgres, 1) as [database], connected(postgres, database.database) as admin:
        admin.execute("CREATE TABLE t AS SELECT generate_series(1, 1000) i")
        admin.execute("CREATE TABLE u AS SELECT generate_series(1, 1000) i")
        with hold_cut([database], Operation()) as cut:
            snapshot = cut.of(database.name).snapshot
            for ddl in ("TRUNCATE t", "ALTER TABLE u ALTER i TYPE bigint"):
                with (
                    connected(postgres, database.database, options="-c lock_timeout=200ms") as other,
                    pytest.raises(psycopg.errors.LockNotAvailable),
                ):
                    other.execute(ddl)
            assert scalar(postgres, database, snapshot, "SELECT count(*) FROM t") == 1000
            assert scalar(postgres, database, snapshot, "SELECT count(*) FROM u") == 1000
        admin.execute("TRUNCATE t")


def test_a_table_made_between_the_locks_and_the_snapshot_is_locked_before_it_is_read(
    postgres: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made_databases(postgres, 1) as [database], connected(postgres, database.database) as admin:
        begin, late = cut_module._begin_snapshot, iter(["CREATE TABLE late AS SELECT generate_series(1, 10) i"])

        def make_a_table_first(held: Held) -> None:
            for statement in late:
                admin.execute(statement)
            begin(held)

        monkeypatch.setattr(cut_module, "_begin_snapshot", make_a_table_first)
        with hold_cut([database], Operation()) as cut:
            held = cut.of(database.name)
            assert scalar(postgres, database, held.snapshot, "SELECT count(*) FROM late") == 10
            locked = admin.execute("SELECT pid FROM pg_locks WHERE relation = 'late'::regclass").fetchall()
            assert {pid for (pid,) in locked} == {held.locks_pid}


def test_a_table_dropped_before_it_is_locked_is_no_fault(
    postgres: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made_databases(postgres, 1) as [database], connected(postgres, database.database) as admin:
        admin.execute("CREATE SCHEMA s; CREATE TABLE s.gone (i int); CREATE TABLE t (i int)")
        lock, early = cut_module.lock_tables, iter(["DROP SCHEMA s CASCADE"])

        def drop_a_table_first(*arguments: object) -> None:
            for statement in early:
                admin.execute(statement)
            lock(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(cut_module, "lock_tables", drop_a_table_first)
        with hold_cut([database], Operation()) as cut:
            assert [name for _, _, name in cut.of(database.name).locked] == ["public.t"]


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("step", ["_begin_snapshot", "_take_snapshot", "_look_at_tables"])
def test_a_holder_lost_each_time_the_snapshots_are_taken_is_a_fault_of_that_database_alone(
    postgres: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with made_databases(postgres, 2) as [broken, whole], connected(postgres, "postgres") as admin:
        take = getattr(cut_module, step)

        def end_it_first(held: Held) -> None:
            if held.database == broken:
                admin.execute("SELECT pg_terminate_backend(%s, 5000)", (held.reader_pid,))
            take(held)

        monkeypatch.setattr(cut_module, step, end_it_first)
        with hold_cut([broken, whole], Operation()) as cut:
            cut.of(whole.name)
            assert set(cut.faults) == {broken.name}
            assert "terminating connection" in str(cut.faults[broken.name])


def test_time_outs_of_the_database_do_not_end_the_holders(postgres: EmbeddedServer) -> None:
    with made_databases(postgres, 1) as [database], connected(postgres, "postgres") as admin:
        for name in ("idle_in_transaction_session_timeout", "idle_session_timeout", "transaction_timeout"):
            admin.execute(f"ALTER DATABASE {database.database} SET {name} = '300ms'")
        with hold_cut([database], Operation()) as cut:
            time.sleep(1)
            cut.of(database.name).prove()


def test_a_database_that_cannot_be_reached_stops_no_other(postgres: EmbeddedServer) -> None:
    with made_databases(postgres, 1) as [good]:
        absent = Database("absent", postgres.url("no_such_database", password="s3cret-word"))
        with hold_cut([absent, good], Operation()) as cut:
            cut.of(good.name)
            assert "no_such_database" in str(cut.faults["absent"])
            assert "create the database" in str(cut.faults["absent"])
            assert "s3cret-word" not in str(cut.faults["absent"])


@pytest.mark.usefixtures("no_pauses")
def test_a_table_that_someone_keeps_locked_is_a_fault_of_that_database_alone(postgres: EmbeddedServer) -> None:
    with made_databases(postgres, 2) as [locked, free], connected(postgres, locked.database) as admin:
        admin.execute("CREATE TABLE t (i int)")
        with admin.transaction():
            admin.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
            with hold_cut([locked, free], Operation(), lock_timeout_seconds=0.3) as cut:
                cut.of(free.name)
                assert "lock" in str(cut.faults[locked.name])
                assert cut.faults[locked.name].passing
                with pytest.raises(FinalError) as seen:
                    cut.of(locked.name)
                assert str(seen.value) == str(cut.faults[locked.name])


def test_a_server_that_has_no_connection_free_for_a_moment_costs_no_database(postgres: EmbeddedServer) -> None:
    """Of a role's two: one is taken by another, so that of our two sessions the second is refused."""
    role = f"few_{uuid4().hex[:8]}"
    with made_databases(postgres, 2) as [crowded, free], connected(postgres, "postgres") as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 2")
        with contextlib.closing(connected(postgres, crowded.database, user=role)) as other:
            pid = other.info.backend_pid
            few = Database(crowded.name, postgres.url(crowded.database, user=role))
            operation = Interrupted(lambda: admin.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,)), 1)
            with hold_cut([few, free], operation) as cut:
                assert operation.pauses[0] == 2
                for database in (few, free):
                    cut.of(database.name).prove()
                assert cut.servers[0].exact
        admin.execute(f"DROP ROLE {role}")


def test_a_table_that_someone_locks_for_a_moment_costs_no_database(postgres: EmbeddedServer) -> None:
    with made_databases(postgres, 1) as [database], connected(postgres, database.database) as admin:
        admin.execute("CREATE TABLE t (i int)")
        admin.execute("BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        operation = Interrupted(lambda: admin.execute("ROLLBACK"))
        with hold_cut([database], operation, lock_timeout_seconds=0.3) as cut:
            cut.of(database.name).prove()
        assert operation.pauses == [2]


def test_a_lock_that_was_waited_for_long_is_not_waited_for_again(
    postgres: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut_module, "_PATIENCE_SECONDS", 0.2)
    with made_databases(postgres, 1) as [database], connected(postgres, database.database) as admin:
        admin.execute("CREATE TABLE t (i int)")
        with admin.transaction():
            admin.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
            operation = Interrupted()
            with hold_cut([database], operation, lock_timeout_seconds=0.3) as cut:
                assert operation.pauses == []
                assert "lock" in str(cut.faults[database.name])


def test_a_server_that_stays_away_is_final_after_some_tries_which_a_cancel_ends(postgres: EmbeddedServer) -> None:
    away = Database("away", postgres.url().set(port=1))
    operation = Interrupted()
    with hold_cut([away], operation) as cut:
        assert operation.pauses == [2, 4, 8]
        with pytest.raises(FinalError, match="Connection refused") as seen:
            cut.of("away")
        assert str(seen.value) == str(cut.faults["away"])
    operation = Interrupted(lambda: operation.cancel("a person said so"))
    with pytest.raises(CancelledError, match="a person said so"), hold_cut([away], operation):
        pass
    assert operation.pauses == [2]


@pytest.mark.usefixtures("no_pauses")
def test_a_holder_lost_once_while_the_snapshots_are_taken_is_opened_again_and_cut_with_the_others(
    postgres: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made_databases(postgres, 2) as [broken, whole], connected(postgres, "postgres") as admin:
        take, ends = cut_module._take_snapshot, iter(["SELECT pg_terminate_backend(%s, 5000)"])

        def end_it_first(held: Held) -> None:
            for statement in ends if held.database == broken else ():
                admin.execute(statement, (held.reader_pid,))
            take(held)

        monkeypatch.setattr(cut_module, "_take_snapshot", end_it_first)
        with hold_cut([broken, whole], Operation()) as cut:
            all_held = [cut.of(one.name) for one in (broken, whole)]
            assert cut.servers[0].exact
            assert len({held.snapshot_text for held in all_held}) == 1
            for held in all_held:
                assert scalar(postgres, held.database, held.snapshot, "SELECT 1") == 1


def test_two_components_that_are_one_database_are_refused(postgres: EmbeddedServer) -> None:
    with made_databases(postgres, 1) as [database]:
        twin = Database("twin", database.url.set(host="localhost"))
        with hold_cut([database, twin], Operation()) as cut:
            assert set(cut.faults) == {database.name, "twin"}
            assert "twin" in str(cut.faults[database.name])


def test_twins_are_found_though_one_of_their_roles_may_not_read_the_control_file(postgres: EmbeddedServer) -> None:
    with made_databases(postgres, 1) as [database]:
        with connected(postgres, database.database) as inside:
            inside.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC; CREATE ROLE humble LOGIN")
        try:
            twin = Database("twin", database.url.set(username="humble"))
            with hold_cut([twin], Operation()) as cut:
                [server] = cut.servers
                assert server.system_identifier is None
            with hold_cut([database, twin], Operation()) as cut:
                assert set(cut.faults) == {database.name, "twin"}
        finally:
            with connected(postgres, "postgres") as admin:
                admin.execute("DROP ROLE humble")


def test_equal_snapshots_of_a_standby_are_not_called_exact(
    postgres: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = held_module.identity
    monkeypatch.setattr(held_module, "identity", lambda session: replace(real(session), in_recovery=True))
    with made_databases(postgres, 2) as databases, hold_cut(databases, Operation()) as cut:
        [server] = cut.servers
        assert server.in_recovery
        assert not server.exact


@pytest.mark.parametrize("which", ["locks", "reader"])
def test_a_terminated_holder_is_noticed_at_once(postgres: EmbeddedServer, which: str) -> None:
    with (
        made_databases(postgres, 1) as [database],
        connected(postgres, "postgres") as admin,
        hold_cut([database], Operation()) as cut,
    ):
        held = cut.of(database.name)
        pid = getattr(held, which).connection.driver_connection.info.backend_pid
        admin.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        with pytest.raises(FinalError, match="lost"):
            held.prove()
        with pytest.raises(FinalError, match="lost"):
            cut.of(database.name)


def test_a_terminated_holder_is_noticed_by_the_watch_alone(postgres: EmbeddedServer) -> None:
    with (
        made_databases(postgres, 1) as [database],
        connected(postgres, "postgres") as admin,
        hold_cut([database], Operation()) as cut,
    ):
        held = cut.of(database.name)
        admin.execute("SELECT pg_terminate_backend(%s, 5000)", (held.locks_pid,))
        await_true(lambda: held.lost is not None, seconds=8)


def test_ddl_that_waits_too_long_ends_the_backup_even_when_its_text_is_hidden_from_us(
    postgres: EmbeddedServer,
) -> None:
    owner = f"owner_{uuid4().hex[:8]}"
    with made_databases(postgres, 1) as [database], connected(postgres, database.database) as admin:
        admin.execute(f"CREATE ROLE {owner} LOGIN")
        admin.execute(f"CREATE TABLE t (i int); ALTER TABLE t OWNER TO {owner}")
        ordinary = Database(database.name, postgres.url(database.database, user=owner))
        with hold_cut([ordinary], Operation(), ddl_wait_limit_seconds=1) as cut:
            held = cut.of(database.name)
            with connected(postgres, database.database, options="-c lock_timeout=10s") as other:
                # A superuser's statement, which the owner may not see; it goes through once the holders are let go.
                other.execute("TRUNCATE t")
                assert f"pid {other.info.backend_pid}" in str(held.lost)
            with pytest.raises(AthenaError, match="given up"):
                cut.of(database.name)
        admin.execute(f"DROP OWNED BY {owner}; DROP ROLE {owner}")


def test_who_waits_is_told_with_what_he_runs_now_and_not_what_he_ran_before(postgres: EmbeddedServer) -> None:
    with made_databases(postgres, 1) as [database], connected(postgres, database.database) as other:
        other.execute("CREATE TABLE t (i int)")

        def run(statement: str) -> threading.Thread:
            def execute() -> None:
                with contextlib.suppress(psycopg.errors.QueryCanceled):
                    other.execute(statement)

            thread = threading.Thread(target=execute)
            thread.start()
            return thread

        with hold_cut([database], Operation()) as cut:
            held = cut.of(database.name)
            for statement in ("ALTER TABLE t ADD COLUMN x text DEFAULT 'a secret'", "TRUNCATE t"):
                waiting = run(statement)
                await_true(lambda: held.waiting() != [])
                assert held.waiting() == [f"pid {other.info.backend_pid} waits with {statement!r}"]
                other.cancel_safe()
                waiting.join()


def can_truncate(postgres: EmbeddedServer, database: Database) -> bool:
    with connected(postgres, database.database, options="-c lock_timeout=300ms") as other:
        try:
            other.execute("TRUNCATE t")
        except psycopg.errors.LockNotAvailable:
            return False
        idle = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND backend_xmin IS NOT NULL AND pid <> pg_backend_pid()"
        assert other.execute(idle, (database.database,)).fetchone() == (0,), "nor does a snapshot hold vacuum back"
        return True


def test_a_database_that_was_read_is_let_go_while_the_others_are_held(postgres: EmbeddedServer) -> None:
    with made_databases(postgres, 2) as [one, other]:
        for database in (one, other):
            with connected(postgres, database.database) as admin:
                admin.execute("CREATE TABLE t (i int)")
        with hold_cut([one, other], Operation()) as cut:
            assert not can_truncate(postgres, one)
            cut.release(one.name)
            cut.release(one.name)
            cut.release("nobody's")
            assert can_truncate(postgres, one)
            assert not can_truncate(postgres, other)
            with pytest.raises(FinalError, match="its part of the cut has ended"):
                cut.of(one.name)
            cut.of(other.name).prove()


@pytest.mark.usefixtures("no_pauses")
def test_a_database_that_can_not_be_read_is_not_held(postgres: EmbeddedServer) -> None:
    with made_databases(postgres, 2) as [database, locked]:
        for each in (database, locked):
            with connected(postgres, each.database) as admin:
                admin.execute("CREATE TABLE t (i int); CREATE TABLE u (i int)")
        twin = Database("twin", database.url)
        with connected(postgres, locked.database) as admin:
            admin.execute("BEGIN; LOCK TABLE u IN ACCESS EXCLUSIVE MODE")
            with hold_cut([database, twin, locked], Operation(), lock_timeout_seconds=0.3) as cut:
                assert set(cut.faults) == {database.name, "twin", locked.name}
                assert can_truncate(postgres, database)
                admin.execute("ROLLBACK")
                assert can_truncate(postgres, locked)


def test_an_address_that_leads_to_several_servers_is_refused(postgres: EmbeddedServer, tmp_path: Path) -> None:
    """One would hold the locks, the other the snapshot; a standby even has the same tables."""
    with (
        embedded_server(tmp_path / "data") as second,
        relayed(postgres.port, second.port) as port,
        hold_cut([Database("spread", postgres.url().set(port=port))], Operation()) as cut,
    ):
        fault = cut.faults["spread"]
        assert f"the server at 127.0.0.1:{postgres.port}, the second that at 127.0.0.1:{second.port}" in str(fault)
        assert "the address leads to several servers: name one of them" in str(fault)
        assert not fault.passing


def test_a_pooler_that_refuses_how_our_sessions_begin_is_told_as_one(postgres: EmbeddedServer) -> None:
    with (
        refusing_pooler() as port,
        hold_cut([Database("pooled", postgres.url().set(port=port))], Operation()) as cut,
    ):
        fault = cut.faults["pooled"]
        assert "reached through a connection pooler" in str(fault)
        assert "the address of the PostgreSQL server itself" in str(fault)
        assert not fault.passing


def test_a_connection_pooler_is_refused(postgres: EmbeddedServer) -> None:
    with (
        made_databases(postgres, 1) as [database],
        relayed(postgres.port, is_pooler=True) as port,
        hold_cut([Database("pooled", database.url.set(port=port))], Operation()) as cut,
    ):
        assert "pooler" in str(cut.faults["pooled"])
