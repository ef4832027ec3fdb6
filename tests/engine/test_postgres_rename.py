"""A staged database takes the live name by its OID, wholly or not at all, and leaves every other database alone."""

import contextlib
import re
import threading
import time
from pathlib import Path

import psycopg
import pytest
from round_trip import RESTORE, Make, dump, rows, sql, stage
from service import await_true
from sqlalchemy import Connection, text

from athena_backup.errors import CancelledError, FinalError
from athena_backup.operation import Operation
from athena_backup.postgres import rename
from athena_backup.postgres.embedded import EmbeddedServer, binaries, embedded_server
from athena_backup.postgres.preflight import preflight_database
from athena_backup.postgres.rename import _terminating, database_oid, drop_database, side_name, switch_database
from athena_backup.postgres.sessions import Database, run_sql, session
from athena_backup.postgres.staging import (
    discard_staging,
    facts_of,
    stage_database,
)
from athena_backup.store.local import LocalStore

# pg_subscription shows those of every database of the server.
_SUBSCRIPTIONS_HERE = "pg_subscription WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())"


def test_the_live_database_serves_on_until_the_switch(make_database: Make, local_store: LocalStore) -> None:
    database = make_database("serving", "CREATE TABLE t AS SELECT 1 AS i")
    component = dump(database, local_store)
    with session(database.url) as client:
        run_sql(client, "INSERT INTO public.t VALUES (2)")
        stage(component, database, local_store)
        assert client.execute(text("SELECT count(*) FROM public.t")).scalar_one() == 2
    assert rows(database, "SELECT count(*) FROM public.t") == [(2,)]


def test_clients_that_reconnect_without_end_do_not_keep_a_switch_from_happening(
    make_database: Make, local_store: LocalStore
) -> None:
    database = make_database("stormed", "CREATE TABLE t AS SELECT 1 AS i")
    component = dump(database, local_store)
    staged = stage(component, database, local_store)
    stopped = threading.Event()
    conninfo = database.url.render_as_string(hide_password=False)

    def storm() -> None:
        while not stopped.is_set():
            try:
                with psycopg.connect(conninfo, connect_timeout=5) as connection:
                    connection.execute("SELECT pg_sleep(0.01)")
            except psycopg.Error:
                continue

    threads = [threading.Thread(target=storm) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        switched = switch_database(database, staged.oid, RESTORE, "app", Operation())
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert switched.live_oid == staged.oid
    assert switched.before_name == side_name(database.database, "b", RESTORE)


def test_a_worker_of_the_servers_own_keeps_nobody_from_being_disconnected(tmp_path: Path) -> None:
    """Autovacuum works in what was just loaded, and only a superuser may end its worker."""
    slow = {"autovacuum_naptime": "1s", "autovacuum_vacuum_cost_delay": "100ms", "autovacuum_vacuum_cost_limit": "1"}
    with embedded_server(tmp_path / "postgres", slow) as server:
        with session(server.url()) as connection:
            run_sql(connection, "CREATE ROLE owner LOGIN")
            for name in ("live", "loaded"):
                run_sql(connection, f"CREATE DATABASE {name} OWNER owner")
        loaded = Database("loaded", server.url("loaded", user="owner"))
        sql(loaded, "CREATE TABLE public.t AS SELECT i, repeat('x', 100) AS v FROM generate_series(1, 200000) i")
        working = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'autovacuum worker' AND datname = 'loaded'"
        admin = Database("admin", server.url())
        await_true(lambda: rows(admin, working), "autovacuum's worker")
        live = server.url("live", user="owner")
        with _terminating(live, ["live", "loaded"]):
            for _ in range(3):
                with psycopg.connect(live.render_as_string(hide_password=False)) as client:
                    await_true(lambda: client.closed or is_ended(client), "the client's end")
        assert rows(admin, working), "it was there all the time"


def is_ended(client: "psycopg.Connection[object]") -> bool:
    try:
        client.execute("SELECT 1")
    except psycopg.OperationalError:
        return True
    return False


def test_a_switch_whose_answer_was_lost_can_be_repeated(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    database = make_database("twice", "CREATE TABLE t AS SELECT 1 AS i")
    staged = stage(dump(database, local_store), database, local_store)
    first = switch_database(database, staged.oid, RESTORE, "app", Operation())
    second = switch_database(database, staged.oid, RESTORE, "app", Operation())
    assert first == second
    with session(postgres.url()) as connection:
        assert database_oid(connection, "twice") == staged.oid


@pytest.mark.parametrize("last", ["COMMIT", "SELECT 'after the commit'"])
def test_a_switch_whose_session_is_lost_ends_switched(
    make_database: Make,
    local_store: LocalStore,
    postgres: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
    last: str,
) -> None:
    database = make_database("unanswered", "CREATE TABLE t AS SELECT 1 AS i")
    staged = stage(dump(database, local_store), database, local_store)
    lost: list[int] = []

    def losing_the_session(connection: Connection, sql: str) -> object:
        if sql != "COMMIT" or lost:
            return run_sql(connection, sql)
        lost.append(run_sql(connection, "SELECT pg_backend_pid()").scalar_one())
        if last != "COMMIT":
            run_sql(connection, "COMMIT")
        with session(postgres.url()) as other:
            run_sql(other, f"SELECT pg_terminate_backend({lost[0]}, 5000)")
        return run_sql(connection, last)

    monkeypatch.setattr(rename, "run_sql", losing_the_session)
    assert switch_database(database, staged.oid, RESTORE, "app", Operation()).live_oid == staged.oid
    assert lost
    with session(postgres.url()) as connection:
        assert database_oid(connection, "unanswered") == staged.oid


def test_a_cancelled_switch_or_loading_says_that_it_was_cancelled(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = make_database("abandoned", "CREATE TABLE t AS SELECT i, md5(i::text) FROM generate_series(1, 300000) i")
    component = dump(database, local_store)
    assert preflight_database(component, database, RESTORE, [binaries()]) == []
    operation = Operation()
    monkeypatch.setattr(operation, "advance", lambda name, size: operation.cancel("abandoned by a person"))
    with pytest.raises(CancelledError, match="by a person"):
        stage_database(component, database, local_store, RESTORE, operation, client_directories=[binaries()])
    discard_staging(database, RESTORE)
    staged = stage(component, database, local_store)
    monkeypatch.setattr(rename, "_terminating", lambda url, names: contextlib.nullcontext())
    operation = Operation()
    with session(database.url):  # RENAME waits for it
        threading.Timer(0.5, lambda: operation.cancel("abandoned by a person")).start()
        began = time.monotonic()
        with pytest.raises(CancelledError, match="by a person"):
            switch_database(database, staged.oid, RESTORE, "app", operation)
    assert time.monotonic() - began < 4.5  # RENAME itself gives up after five


def test_a_staging_that_somebody_replaced_is_never_switched_in(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    database = make_database("replaced", "CREATE TABLE t AS SELECT 1 AS i")
    staged = stage(dump(database, local_store), database, local_store)
    with session(postgres.url()) as connection:
        live = database_oid(connection, "replaced")
        run_sql(connection, f'DROP DATABASE "{staged.name}"')
        run_sql(connection, f'CREATE DATABASE "{staged.name}"')
        with pytest.raises(FinalError, match="not the database that was staged"):
            switch_database(database, staged.oid, RESTORE, "app", Operation())
        assert database_oid(connection, "replaced") == live
        with pytest.raises(FinalError, match="is kept"):
            drop_database(connection, staged.name, staged.oid)


def test_names_at_the_limit_of_63_bytes_never_meet_the_live_one(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    long = "größe_" + "x" * 55  # 63 bytes
    assert len(long.encode()) == 63
    database = make_database(long, "CREATE TABLE t AS SELECT 1 AS i")
    component = dump(database, local_store)
    staged = stage(component, database, local_store)
    assert len(staged.name.encode()) <= 63
    assert staged.name != long
    switch_database(database, staged.oid, RESTORE, "app", Operation())
    discard_staging(database, RESTORE)
    assert rows(database, "SELECT i FROM public.t") == [(1,)]


def test_a_template_comes_back_as_one_and_the_replaced_one_is_dropped_like_any_other(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    database = make_database("mould", "CREATE TABLE t AS SELECT 1 AS i")
    with session(postgres.url()) as connection:
        run_sql(connection, "ALTER DATABASE mould IS_TEMPLATE true")
    component = dump(database, local_store)
    staged = stage(component, database, local_store)
    switch_database(database, staged.oid, RESTORE, "app", Operation())
    assert discard_staging(database, RESTORE) == [side_name("mould", "b", RESTORE)]
    assert rows(database, "SELECT datistemplate FROM pg_database WHERE datname = 'mould'") == [(True,)]
    with session(postgres.url()) as connection:
        run_sql(connection, "ALTER DATABASE mould IS_TEMPLATE false")


def test_a_subscription_comes_back_disabled_and_does_not_keep_its_staging_from_being_dropped(
    make_database: Make, local_store: LocalStore
) -> None:
    database = make_database("listening")
    create = "CREATE SUBSCRIPTION far CONNECTION 'host=nowhere' PUBLICATION p WITH (connect = false, slot_name = 'far')"
    with session(database.url) as connection:
        run_sql(connection, create)
        component = dump(database, local_store)
        run_sql(connection, "ALTER SUBSCRIPTION far SET (slot_name = NONE)")
        run_sql(connection, "DROP SUBSCRIPTION far")
    staged = stage(component, database, local_store)
    inside = Database("inside", database.url.set(database=staged.name))
    assert rows(inside, f"SELECT subname, subenabled, subslotname FROM {_SUBSCRIPTIONS_HERE}") == [
        ("far", False, "far")
    ]
    assert staged.notes == ("subscription far is disabled: enable it where it is to be used here",)
    assert discard_staging(database, RESTORE) == [staged.name]


@pytest.mark.parametrize(
    ("make", "drop", "named"),
    [
        (
            "SELECT pg_create_logical_replication_slot('debezium', 'test_decoding')",
            "SELECT pg_drop_replication_slot('debezium')",
            "replication slot debezium",
        ),
        (
            "CREATE SUBSCRIPTION late CONNECTION 'host=nowhere.invalid' PUBLICATION p WITH (connect = false)",
            "ALTER SUBSCRIPTION late SET (slot_name = NONE); DROP SUBSCRIPTION late",
            "subscription late",
        ),
    ],
    ids=["slot", "subscription"],
)
def test_replication_that_was_set_up_while_the_staging_was_loaded_is_not_lost_by_the_switch(
    make_database: Make, local_store: LocalStore, make: str, drop: str, named: str
) -> None:
    database = make_database("followed", "CREATE TABLE t AS SELECT 1 AS i")
    component = dump(database, local_store)
    staged = stage(component, database, local_store)
    with session(database.url) as connection:
        run_sql(connection, make)
        run_sql(connection, "INSERT INTO public.t VALUES (2)")
    with pytest.raises(FinalError, match=named):
        switch_database(database, staged.oid, RESTORE, "app", Operation())
    assert rows(database, "SELECT count(*) FROM public.t") == [(2,)]
    with session(database.url) as connection:
        for statement in drop.split("; "):
            run_sql(connection, statement)
    switch_database(database, staged.oid, RESTORE, "app", Operation())
    assert rows(database, "SELECT count(*) FROM public.t") == [(1,)]


def test_the_owner_of_a_subscription_is_one_of_the_roles_that_a_restore_needs(
    make_database: Make, local_store: LocalStore
) -> None:
    database = make_database("heard", "CREATE ROLE hearer SUPERUSER")
    with session(database.url) as connection:
        run_sql(
            connection,
            "CREATE SUBSCRIPTION far CONNECTION 'host=nowhere' PUBLICATION p WITH (connect = false, slot_name = NONE)",
        )
        run_sql(connection, "ALTER SUBSCRIPTION far OWNER TO hearer")
        component = dump(database, local_store)
        run_sql(connection, "DROP SUBSCRIPTION far")
        run_sql(connection, "DROP ROLE hearer")
    assert "hearer" in [role.name for role in facts_of(component).roles]
    staged = stage(component, database, local_store)
    inside = Database("inside", database.url.set(database=staged.name))
    assert rows(inside, f"SELECT subname, subowner::regrole::text FROM {_SUBSCRIPTIONS_HERE}") == [("far", "hearer")]
    discard_staging(database, RESTORE)
    with session(database.url) as connection:
        run_sql(connection, "DROP ROLE hearer")


def test_discarding_leaves_other_databases_alone(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    database = make_database("mine", "CREATE TABLE t AS SELECT 1 AS i")
    make_database("mine2__athena_r_0123456789ab")
    make_database("mine__athena_r_notours")
    stage(dump(database, local_store), database, local_store)
    assert discard_staging(database) == ["mine__athena_r_0123456789ab"]
    with session(postgres.url()) as connection:
        assert database_oid(connection, "mine2__athena_r_0123456789ab") is not None
        assert database_oid(connection, "mine__athena_r_notours") is not None
        assert database_oid(connection, "mine") is not None


@pytest.mark.parametrize("name", ["x" * 63, "ü" * 40, "a", "__athena_r_0123456789ab"])
def test_a_side_name_fits_and_ends_with_twelve_digits(name: str) -> None:
    made = side_name(name, "b", RESTORE)
    assert len(made.encode()) <= 63
    assert re.search(r"__athena_b_[0-9a-f]{12}$", made)
    assert made.encode().decode() == made


def test_databases_whose_names_begin_alike_never_share_a_side_database(
    make_database: Make, postgres: EmbeddedServer
) -> None:
    alike = "a_name_of_exactly_thirty_bytes"
    names = [alike, f"{alike}_one", f"{alike}_two"]
    sides = {name: side_name(name, "r", RESTORE) for name in names}
    assert len(set(sides.values())) == 3
    for name in [*names, *sides.values()]:
        make_database(name)
    one = Database("one", postgres.url(names[1]))
    assert discard_staging(one, "ffffffffffff") == []
    assert discard_staging(one, RESTORE) == [sides[names[1]]]
    assert discard_staging(Database("short", postgres.url(alike))) == [sides[alike]]
    with session(postgres.url()) as connection:
        assert database_oid(connection, sides[names[2]]) is not None
