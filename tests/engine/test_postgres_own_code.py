"""A restore is compared with its backup before anything of the database's own runs, and what runs in between can not hinder it."""

import threading
import time
from pathlib import Path

import pytest
from round_trip import ALL_BY_COPY, RESTORE, Make, dump, restore, rows, stage

from athena_backup.errors import PassingError, UnavailableError
from athena_backup.operation import Operation
from athena_backup.postgres.clients import lost_connection
from athena_backup.postgres.embedded import embedded_server
from athena_backup.postgres.load import Loading
from athena_backup.postgres.rename import switch_database
from athena_backup.postgres.sessions import Database, run_sql, session
from athena_backup.store.local import LocalStore

AUDITED = (
    "CREATE TABLE ddl_log (tag text); CREATE TABLE t AS SELECT i FROM generate_series(1, 100) i;"
    " CREATE SEQUENCE drawn;"
    " CREATE FUNCTION log_ddl() RETURNS event_trigger LANGUAGE plpgsql"
    " AS $$BEGIN INSERT INTO public.ddl_log VALUES (tg_tag); END$$;"
    " CREATE MATERIALIZED VIEW v AS SELECT nextval('public.drawn') AS n, i FROM public.t;"
    " CREATE UNIQUE INDEX v_i ON v (i);"
    " CREATE EVENT TRIGGER audit ON ddl_command_end EXECUTE FUNCTION log_ddl();"
    " COMMENT ON EVENT TRIGGER audit IS 'who did what';"
    " CREATE TABLE u AS SELECT 1 AS i"
)


@pytest.mark.parametrize("sizes", [{}, ALL_BY_COPY], ids=["as it comes", "all by COPY"])
def test_event_triggers_and_views_that_write_do_not_fail_the_comparison(
    make_database: Make, local_store: LocalStore, sizes: dict[str, int]
) -> None:
    database = make_database("audited", AUDITED)
    logged = rows(database, "SELECT tag FROM public.ddl_log")
    assert logged == [("CREATE TABLE AS",)]
    component = dump(database, local_store, **sizes)
    restore(component, database, local_store)
    assert rows(database, "SELECT tag FROM public.ddl_log") == logged, "a restore is no DDL of somebody's"
    assert rows(database, "SELECT count(*), count(DISTINCT n) FROM public.v") == [(100, 100)]
    assert rows(database, "SELECT reltuples FROM pg_class WHERE relname = 'v'") == [(100,)], "analyzed when filled"
    described = "SELECT evtname::text, obj_description(oid, 'pg_event_trigger') FROM pg_event_trigger"
    assert rows(database, described) == [("audit", "who did what")]
    with session(database.url) as connection:
        run_sql(connection, "CREATE TABLE public.w (i int)")
    assert rows(database, "SELECT count(*) FROM public.ddl_log") == [(2,)], "it works again"


def test_a_database_that_refuses_ddl_comes_back(make_database: Make, local_store: LocalStore) -> None:
    database = make_database(
        "refusing",
        "CREATE TABLE t AS SELECT 1 AS i; CREATE MATERIALIZED VIEW v AS SELECT i FROM public.t;"
        " CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql"
        " AS $$BEGIN RAISE EXCEPTION 'no DDL here: %', tg_tag; END$$;"
        " CREATE EVENT TRIGGER refusing ON ddl_command_start EXECUTE FUNCTION refuse()",
    )
    restore(dump(database, local_store), database, local_store)
    assert rows(database, "SELECT i FROM public.v") == [(1,)]
    assert rows(database, "SELECT evtname::text FROM pg_event_trigger") == [("refusing",)]


def test_a_materialized_view_that_can_not_be_filled_is_told_and_loses_nothing_else(
    make_database: Make, local_store: LocalStore
) -> None:
    """As one that asks another server, which is gone on the same day."""
    database = make_database(
        "asking",
        "CREATE TABLE t AS SELECT 1 AS i; CREATE MATERIALIZED VIEW after AS SELECT i FROM public.t;"
        " CREATE FUNCTION ask() RETURNS int LANGUAGE plpgsql AS $$BEGIN"
        " IF current_database() LIKE '%athena%' THEN RAISE 'the other server is gone'; END IF; RETURN 1; END$$;"
        ' CREATE MATERIALIZED VIEW "asks it" AS SELECT public.ask() AS i;'
        ' CREATE MATERIALIZED VIEW built_on_it AS SELECT i FROM public."asks it"',
    )
    staged = stage(dump(database, local_store), database, local_store)
    told = [note for note in staged.notes if note.startswith("materialized view ")]
    assert [note.partition(" is empty, REFRESH it")[0] for note in told] == [
        "materialized view public asks it",
        "materialized view public built_on_it",
    ]
    assert "the other server is gone" in told[0]
    switch_database(database, staged.oid, RESTORE, "app", Operation())
    filled = "SELECT matviewname::text, ispopulated FROM pg_matviews ORDER BY 1"
    assert rows(database, filled) == [("after", True), ("asks it", False), ("built_on_it", False)]
    assert rows(database, "SELECT i FROM public.after") == [(1,)]


def test_a_database_that_greets_who_comes_in_is_backed_up(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login's event trigger (since 17) may have something to tell or to warn of, which is no warning of pg_dump's."""
    database = make_database(
        "greeting",
        "CREATE TABLE t AS SELECT 1 AS i; CREATE FUNCTION greet() RETURNS event_trigger LANGUAGE plpgsql"
        " AS $$BEGIN RAISE NOTICE 'welcome'; RAISE WARNING 'mind the gap' USING HINT = 'jump'; END$$;"
        " CREATE EVENT TRIGGER greeting ON login EXECUTE FUNCTION greet()",
    )
    restore(dump(database, local_store), database, local_store)
    assert rows(database, "SELECT i FROM public.t") == [(1,)]

    def no_session_is_left(_: object) -> frozenset[str]:
        raise PassingError("the server could not be asked")

    monkeypatch.setattr("athena_backup.postgres.dump.greeting", no_session_is_left)
    with pytest.raises(PassingError, match="mind the gap; the server could not be asked"):
        dump(database, local_store)


def test_what_a_server_is_set_to_hinders_no_restore(tmp_path: Path, local_store: LocalStore) -> None:
    """Read-only by default, and with a limit for idle sessions, as of one that waits while another makes an index."""
    settings = {"default_transaction_read_only": "on", "idle_session_timeout": "1h"}
    with embedded_server(tmp_path / "postgres", settings) as server:
        with session(server.url()) as connection:
            run_sql(connection, "CREATE DATABASE careful")
        database = Database("careful", server.url("careful"))
        with session(database.url) as connection:
            # The index's function sees what the session that makes the index is set to.
            run_sql(
                connection,
                "CREATE TABLE public.t AS SELECT i FROM generate_series(1, 10) i;"
                " CREATE FUNCTION public.seen(i int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$BEGIN"
                " IF current_setting('idle_session_timeout') <> '0' THEN RAISE 'ended when idle'; END IF; RETURN i;"
                " END$$; CREATE INDEX seen ON public.t (public.seen(i))",
            )
        restore(dump(database, local_store), database, local_store)
        assert rows(database, "SELECT count(*) FROM public.t") == [(10,)]


def test_a_pg_restore_whose_session_is_ended_is_worth_another_try(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = make_database(
        "ended",
        "CREATE TABLE t AS SELECT 1 AS i; CREATE TABLE gate (i int);"
        " CREATE FUNCTION slow(i int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$BEGIN"
        " PERFORM pg_sleep(60) WHERE current_database() LIKE '%athena%'; RETURN i; END$$;"
        " CREATE INDEX slow ON t (public.slow(i))",
    )
    component = dump(database, local_store)

    def end_it() -> None:
        deadline = time.monotonic() + 60
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX slow %'"
        while not rows(database, ended):
            assert time.monotonic() < deadline
            threading.Event().wait(0.02)

    ending = threading.Thread(target=end_it)
    ending.start()
    with pytest.raises(UnavailableError, match="terminating connection"):
        stage(component, database, local_store)
    ending.join()


@pytest.mark.parametrize(
    ("said", "is_lost"),
    [
        (["pg_restore: error: could not execute query: FATAL:  terminating connection due to administrator command"], True),
        (["pg_restore: error: could not execute query: server closed the connection unexpectedly"], True),
        (["pg_restore: error: COPY failed: SSL connection has been closed unexpectedly"], True),
        (["pg_dump: error: query failed: SSL SYSCALL error: EOF detected"], True),
        (['pg_dump: error: connection to server at "db", port 5432 failed: Connection refused'], True),
        (['pg_dump: [archiver (db)] connection to database "asp" failed: could not connect to server: timed out'], True),
        (
            [
                'pg_dump: error: Dumping the contents of table "t" failed: PQgetResult() failed.',
                "pg_dump: detail: Error message from server: FATAL:  terminating connection due to administrator command",
            ],
            True,
        ),
        (
            [
                'pg_dump: error: Dumping the contents of table "t" failed: PQgetResult() failed.',
                'pg_dump: detail: Error message from server: ERROR:  could not connect to server "far"',
            ],
            False,
        ),
        (
            [
                'pg_restore: error: could not execute query: ERROR:  could not connect to server "far"',
                'DETAIL:  connection to server at "10.0.0.1", port 5432 failed: Connection refused',
            ],
            False,
        ),
        (["pg_restore: error: COPY failed: ERROR:  invalid value", "CONTEXT:  t, line 1: server closed the connection"], False),
    ],
)  # fmt: skip
def test_only_a_connection_of_its_own_that_a_client_program_lost_is_worth_another_try(
    said: list[str], is_lost: bool
) -> None:
    assert lost_connection(said) == is_lost


def test_a_server_that_is_lost_while_a_table_is_analyzed_fails_the_load(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made up: what a server had not written when it died is not there when it is back, and nobody would see it."""
    database = make_database("lost", "CREATE TABLE t AS SELECT 1 AS i")
    component = dump(database, local_store)
    real = Loading.analyze

    def lost(loading: Loading, tables, turn) -> None:  # type: ignore[no-untyped-def]
        monkeypatch.setattr("athena_backup.postgres.load.run_sql", refuse)
        real(loading, tables, turn)

    def refuse(*_: object) -> None:
        raise UnavailableError("PostgreSQL: server closed the connection unexpectedly")

    monkeypatch.setattr(Loading, "analyze", lost)
    with pytest.raises(UnavailableError, match="closed the connection"):
        stage(component, database, local_store)
