"""A database comes back exactly: loaded beside the live one, proven, and given all that no dump of one database holds."""

import socket
import threading
from pathlib import Path

import psycopg
import pytest
from relays import relayed
from round_trip import ALL_BY_COPY, RESTORE, Make, dump, restore, rows, stage, stock_dump
from sqlalchemy import text

from athena_backup.errors import DamagedError, FinalError, UnavailableError
from athena_backup.manifest import Label, SequenceState, Setting
from athena_backup.operation import Operation
from athena_backup.postgres import clients, embedded, staging
from athena_backup.postgres.embedded import EmbeddedServer, binaries, embedded_server
from athena_backup.postgres.load import failed_only_to_set_transaction_timeout
from athena_backup.postgres.preflight import preflight_database
from athena_backup.postgres.rename import database_oid
from athena_backup.postgres.roles import discard_roles
from athena_backup.postgres.sessions import Database, run_sql, session
from athena_backup.postgres.staging import (
    await_server,
    discard_staging,
    dress,
    facts_of,
    stage_database,
)
from athena_backup.process import Ended
from athena_backup.store.local import LocalStore
from deployments.demo_databases import build_databases, fingerprint_databases


@pytest.mark.parametrize("sizes", [{}, ALL_BY_COPY], ids=["as it comes", "all by COPY"])
def test_everything_a_database_can_hold_comes_back_equal(
    postgres: EmbeddedServer, local_store: LocalStore, sizes: dict[str, int]
) -> None:
    server = postgres.url()
    names = ("asp", "airflow", "gogs", "exec", "metadata")
    build_databases(server, 0.01)
    try:
        before = fingerprint_databases(server, binaries())
        schemas = {name: stock_dump(server.set(database=name), "--schema-only") for name in names}
        data = {name: sorted(stock_dump(server.set(database=name), "--data-only")) for name in names}
        for name in names:
            target = Database(name, server.set(database=name))
            component = dump(target, local_store, **sizes)
            tables = [table for table in facts_of(component).tables if table.rows]
            assert not sizes or len(component.streams) > len(tables)
            with session(server) as connection:
                run_sql(connection, f"DROP DATABASE {name} WITH (FORCE)")
            restore(component, target, local_store)
        assert fingerprint_databases(server, binaries()) == before
        for name in names:
            assert stock_dump(server.set(database=name), "--schema-only") == schemas[name]
            assert sorted(stock_dump(server.set(database=name), "--data-only")) == data[name]
    finally:
        with session(server) as connection:
            for name in names:
                run_sql(connection, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            for role in ("analyst", "reporting", "prophecy"):
                run_sql(connection, f"DROP ROLE IF EXISTS {role}")


def test_what_hangs_on_a_databases_oid_comes_back_though_the_oid_is_new(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    database = make_database('dressed: 100% "odd"', "CREATE TABLE t AS SELECT 1 AS i")
    with session(postgres.url()) as connection:
        run_sql(connection, "CREATE ROLE dressed_reader NOLOGIN")
        for statement in (
            "COMMENT ON DATABASE {} IS 'it''s: 100%'",
            "GRANT CREATE ON DATABASE {} TO dressed_reader WITH GRANT OPTION",
            'ALTER DATABASE {} SET search_path = "$user", public, "odd: 5%"',
            "ALTER DATABASE {} SET extra_float_digits = -5",
            "ALTER DATABASE {} SET default_transaction_read_only = on",
            "ALTER DATABASE {} SET \"my.setting\" = 'a: ''b'', c\\d'",
            "ALTER ROLE dressed_reader IN DATABASE {} SET work_mem = '8MB'",
            "ALTER DATABASE {} CONNECTION LIMIT 7",
        ):
            run_sql(connection, statement.format('"dressed: 100% ""odd"""'))
    properties = (
        "SELECT datconnlimit, ARRAY(SELECT unnest(datacl)::text ORDER BY 1), shobj_description(d.oid, 'pg_database'),"
        " ARRAY(SELECT s.setrole::regrole::text || unnest(s.setconfig) FROM pg_db_role_setting s WHERE s.setdatabase = d.oid ORDER BY 1)"
        " FROM pg_database d WHERE datname = current_database()"
    )
    before = rows(database, properties)
    component = dump(database, local_store)
    with session(postgres.url()) as connection:
        old = database_oid(connection, database.database)
    restore(component, database, local_store)
    with session(postgres.url()) as connection:
        assert database_oid(connection, database.database) != old
        assert rows(database, properties) == before
        run_sql(connection, 'ALTER DATABASE "dressed: 100% ""odd""" RESET ALL')
        run_sql(connection, 'REVOKE ALL ON DATABASE "dressed: 100% ""odd""" FROM dressed_reader')
        run_sql(connection, 'ALTER ROLE dressed_reader IN DATABASE "dressed: 100% ""odd""" RESET ALL')
        run_sql(connection, "DROP ROLE dressed_reader")


@pytest.mark.parametrize(
    "statements",
    [
        (
            "GRANT CREATE ON DATABASE granted TO passer WITH GRANT OPTION",
            "SET ROLE passer",
            "GRANT CREATE ON DATABASE granted TO receiver",
        ),
        ("REVOKE CREATE ON DATABASE granted FROM postgres",),
        ("REVOKE ALL ON DATABASE granted FROM postgres, PUBLIC",),
    ],
    ids=["passed on", "owner without a right", "nobody"],
)
def test_rights_on_a_database_come_back_with_who_gave_them(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer, statements: tuple[str, ...]
) -> None:
    database = make_database("granted", "CREATE ROLE passer; CREATE ROLE receiver")
    with session(postgres.url()) as connection:
        for statement in statements:
            run_sql(connection, statement)
    acl = "SELECT datacl::text FROM pg_database WHERE datname = current_database()"
    before = rows(database, acl)
    restore(dump(database, local_store), database, local_store)
    assert rows(database, acl) == before
    with session(postgres.url()) as connection:
        run_sql(connection, "DROP DATABASE granted")
        run_sql(connection, "DROP ROLE passer, receiver")


def test_settings_that_would_end_or_change_our_own_session_come_back_as_they_were(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    make_database("settled")
    with session(postgres.url()) as connection:
        for setting in (
            "temp_tablespaces = pg_default, 'not there'",
            "session_preload_libraries = 'auto_explain', 'pg_trgm'",
            "search_path = ''",
            "statement_timeout = 1",
            "transaction_timeout = 1",
            "idle_session_timeout = 1",
            "role = pg_monitor",
        ):
            run_sql(connection, f"ALTER DATABASE settled SET {setting}")
        settings = (
            "SELECT unnest(setconfig) FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase"
            " WHERE datname = 'settled' ORDER BY 1"
        )
        before = run_sql(connection, settings).all()
        facts = facts_of(dump(make_database("plainer"), local_store))
        staged = make_database("settled2")
        made = tuple(
            Setting(role=None, name=name, value=value) for name, _, value in (row[0].partition("=") for row in before)
        )
        with session(staged.url) as inside:
            dress(inside, "settled2", facts.model_copy(update={"settings": made}))
        assert run_sql(connection, settings.replace("'settled'", "'settled2'")).all() == before


def test_settings_that_can_not_be_set_here_are_told_and_lose_nothing_else(
    make_database: Make, local_store: LocalStore
) -> None:
    """As one of an older server that this one does not know, or one of another role, which an ordinary owner may not set."""
    database = make_database("unsettled", "CREATE TABLE t AS SELECT 1 AS i")
    component = dump(database, local_store)
    wanted = (
        Setting(role=None, name="operator_precedence_warning", value="off"),
        Setting(role="nobody_here", name="work_mem", value="8MB"),
        Setting(role=None, name="work_mem", value="5MB"),
    )
    facts = facts_of(component).model_copy(
        update={"settings": wanted, "labels": (Label(provider="selinux", label="secret"),)}
    )
    staged = stage(component.model_copy(update={"database": facts}), database, local_store)
    assert [note.partition(" could not")[0] for note in staged.notes] == [
        "the security label of selinux",
        "the setting operator_precedence_warning",
        "the setting work_mem of role nobody_here",
    ]
    with session(database.url) as connection:
        made = "SELECT unnest(setconfig) FROM pg_db_role_setting WHERE setdatabase = :oid"
        assert list(connection.execute(text(made), {"oid": staged.oid}).scalars()) == ["work_mem=5MB"]


def test_a_server_that_restarts_is_waited_for(postgres: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_SERVER_LOOK_SECONDS", 0.05)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen: whoever comes is refused
        port = taken.getsockname()[1]
        target = Database("app", postgres.url("app").set(port=port))
        waiting = threading.Thread(target=await_server, args=(target, Operation()))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
    with relayed(postgres.port, port=port):
        waiting.join(30)
        assert not waiting.is_alive()
    monkeypatch.setattr(staging, "SERVER_SECONDS", 0.2)
    with socket.socket() as taken, pytest.raises(UnavailableError):
        taken.bind(("127.0.0.1", 0))
        await_server(Database("app", target.url.set(port=taken.getsockname()[1])), Operation())


def test_a_dump_of_a_newer_client_restores_into_a_server_that_lacks_its_settings(
    local_store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = Path("/usr/lib/postgresql/15/bin")
    if not (older / "postgres").exists():
        pytest.skip("no server older than 17 is installed here")
    newer = binaries()
    monkeypatch.setattr(embedded, "binaries", lambda: older)
    monkeypatch.setattr(clients, "_INSTALLATIONS", ())
    monkeypatch.setenv("PATH", str(newer))
    with embedded_server(tmp_path / "data") as server:
        database = Database("older", server.url("older"))
        with session(server.url()) as connection:
            run_sql(connection, "CREATE DATABASE older")
        with session(database.url, {"search_path": "public"}) as connection:
            run_sql(connection, "CREATE TABLE t AS SELECT generate_series(1, 10) AS i")
        component = dump(database, local_store)
        assert facts_of(component).dump_version.startswith("18.")
        restore(component, database, local_store)
        assert rows(database, "SELECT count(*) FROM public.t") == [(10,)]
        # Of a server of that age whoever creates a role is no member of it by that alone.
        with session(server.url()) as connection:
            run_sql(connection, "CREATE ROLE maker LOGIN CREATEDB CREATEROLE; CREATE ROLE former")
            run_sql(connection, "ALTER DATABASE older OWNER TO former")
        with session(database.url) as connection:
            run_sql(connection, "ALTER TABLE public.t OWNER TO former")
        component = dump(database, local_store)
        with session(server.url()) as connection:
            run_sql(connection, "DROP DATABASE older")
            run_sql(connection, "DROP ROLE former")
        restore(component, Database("older", database.url.set(username="maker")), local_store)
        assert rows(database, "SELECT tableowner::text FROM pg_tables WHERE tablename = 't'") == [("former",)]


_UNKNOWN_SETTING = (
    "pg_restore: while INITIALIZING:",
    'pg_restore: error: could not execute query: ERROR:  unrecognized configuration parameter "transaction_timeout"',
    "Command was: SET transaction_timeout = 0;",
)


@pytest.mark.parametrize(
    ("code", "said", "expected"),
    [
        (1, (*_UNKNOWN_SETTING, "pg_restore: warning: errors ignored on restore: 1"), True),
        (1, _UNKNOWN_SETTING, False),
        (2, (*_UNKNOWN_SETTING, "pg_restore: warning: errors ignored on restore: 1"), False),
        (1, (*_UNKNOWN_SETTING, "pg_restore: warning: errors ignored on restore: 2"), False),
        (1, ("pg_restore: error: no", "pg_restore: warning: errors ignored on restore: 1"), False),
        (1, (), False),
    ],
)
def test_no_other_error_of_pg_restore_is_forgiven(code: int, said: tuple[str, ...], expected: bool) -> None:
    assert failed_only_to_set_transaction_timeout(Ended("pg_restore", code, said)) is expected


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "EUC_JP", "EUC_TW", "KOI8R"])
def test_every_encoding_of_a_server_comes_back_with_its_names_and_bytes(
    local_store: LocalStore, postgres: EmbeddedServer, encoding: str
) -> None:
    # In SQL_ASCII and LATIN1, a name and a value with a byte that is no UTF-8.
    odd = b"\xe4" if encoding in ("SQL_ASCII", "LATIN1") else b"a"
    with session(postgres.url()) as connection:
        run_sql(
            connection,
            f"CREATE DATABASE encoded ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0",
        )
    target = Database("encoded", postgres.url("encoded"))

    def read(sql: bytes) -> list[tuple[object, ...]]:
        with psycopg.connect(target.url.set(query={"client_encoding": "SQL_ASCII"}).render_as_string(False)) as raw:
            return raw.execute(sql).fetchall()

    try:
        with psycopg.connect(target.url.set(query={"client_encoding": "SQL_ASCII"}).render_as_string(False)) as raw:
            raw.execute(b"CREATE TABLE \"t%s\" AS SELECT 'x%s'::text AS v" % (odd, odd))
            raw.execute(b'CREATE SEQUENCE "s%s SEQUENCE SET "; SELECT setval(\'"s%s SEQUENCE SET "\', 7)' % (odd, odd))
            raw.execute(b"COMMENT ON DATABASE encoded IS 'c%s'" % odd)
        restore(dump(target, local_store), target, local_store)
        assert read(b'SELECT v::bytea FROM "t%s"' % odd) == [(b"x" + odd,)]
        assert read(b'SELECT last_value FROM "s%s SEQUENCE SET "' % odd) == [(7,)]
        [(made, comment)] = read(
            b"SELECT pg_encoding_to_char(encoding), shobj_description(oid, 'pg_database')::bytea FROM pg_database"
            b" WHERE datname = current_database()"
        )
        assert (made, comment) == (encoding.encode(), b"c" + odd)
    finally:
        discard_staging(target)
        with session(postgres.url()) as connection:
            run_sql(connection, "DROP DATABASE encoded WITH (FORCE)")


def test_a_database_that_was_dropped_is_made_again(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    database = make_database("lost", "CREATE TABLE t AS SELECT generate_series(1, 10) AS i")
    component = dump(database, local_store)
    with session(postgres.url()) as connection:
        run_sql(connection, "DROP DATABASE lost")
    restore(component, database, local_store)
    assert rows(database, "SELECT count(*) FROM public.t") == [(10,)]


def test_a_damaged_dump_is_never_switched_in(make_database: Make, local_store: LocalStore) -> None:
    database = make_database("damaged", "CREATE TABLE t AS SELECT i, md5(i::text) FROM generate_series(1, 50000) i")
    component = dump(database, local_store)
    path = Path(local_store.location.place) / component.parts[0].key
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    assert preflight_database(component, database, RESTORE, [binaries()]) == []
    with pytest.raises(DamagedError, match="damaged"):
        stage_database(component, database, local_store, RESTORE, Operation(), client_directories=[binaries()])
    assert rows(database, "SELECT count(*) FROM public.t") == [(50000,)]


def test_a_dump_that_restores_with_exit_code_0_but_fewer_rows_is_found_out(
    make_database: Make, local_store: LocalStore
) -> None:
    database = make_database(
        "fewer", "CREATE TABLE t AS SELECT generate_series(1, 10) AS i; CREATE SEQUENCE s; SELECT nextval('s')"
    )
    component = dump(database, local_store)
    assert component.database is not None
    (table,) = component.database.tables
    promised = component.database.model_copy(update={"tables": (table.model_copy(update={"rows": 11}),)})
    assert preflight_database(component, database, RESTORE, [binaries()]) == []
    with pytest.raises(DamagedError, match="10 rows instead of 11"):
        stage_database(
            component.model_copy(update={"database": promised}),
            database,
            local_store,
            RESTORE,
            Operation(),
            client_directories=[binaries()],
        )


@pytest.mark.parametrize(
    ("promise", "found"),
    [
        ({"large_objects": 3}, "1 large objects instead of 3"),
        (
            {"sequences": (SequenceState(schema_name="public", name="s", last_value=2, is_called=True),)},
            "public.s stands at 1, not 2",
        ),
    ],
    ids=["large objects", "sequences"],
)
def test_large_objects_and_sequences_are_compared_with_the_manifest(
    make_database: Make, local_store: LocalStore, promise: dict[str, object], found: str
) -> None:
    database = make_database("promised", "CREATE SEQUENCE s; SELECT nextval('s'), lo_create(0)")
    component = dump(database, local_store)
    promised = component.model_copy(update={"database": facts_of(component).model_copy(update=promise)})
    with pytest.raises(DamagedError, match=found):
        stage(promised, database, local_store)


def test_a_dump_whose_loading_fails_in_the_middle_is_never_switched_in(
    make_database: Make, local_store: LocalStore
) -> None:
    # Restores nowhere: the check calls a function that needs a table which comes later in the dump's order.
    database = make_database(
        "selfish",
        "CREATE TABLE z (i integer); INSERT INTO z VALUES (1);"
        "CREATE FUNCTION known(integer) RETURNS boolean LANGUAGE sql AS 'SELECT EXISTS (SELECT FROM public.z WHERE i = $1)';"
        "CREATE TABLE a (i integer CHECK (known(i))); INSERT INTO a VALUES (1)",
    )
    component = dump(database, local_store)
    with pytest.raises(FinalError, match=r"pg_restore ended with exit code 1.*violates check constraint"):
        stage(component, database, local_store)


def test_a_staged_database_has_statistics_before_it_is_switched_in(
    make_database: Make, local_store: LocalStore
) -> None:
    database = make_database("analyzed", "CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")
    staged = stage(dump(database, local_store), database, local_store)
    inside = Database("inside", database.url.set(database=staged.name))
    assert rows(inside, "SELECT reltuples FROM pg_class WHERE relname = 't'") == [(1000,)]
    assert rows(inside, "SELECT count(*) FROM pg_stats WHERE tablename = 't'") == [(1,)]


def test_roles_that_are_missing_are_made_without_any_power_and_existing_ones_are_not_touched(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    with session(postgres.url()) as connection:
        run_sql(connection, "CREATE ROLE mighty SUPERUSER LOGIN CREATEROLE REPLICATION BYPASSRLS PASSWORD 'secret'")
        run_sql(connection, "CREATE ROLE present LOGIN CONNECTION LIMIT 3")
    database = make_database(
        "roles", "CREATE TABLE t (i integer); ALTER TABLE t OWNER TO mighty; GRANT SELECT ON t TO present"
    )
    component = dump(database, local_store)
    with session(postgres.url()) as connection:
        run_sql(connection, "DROP DATABASE roles")
        run_sql(connection, "DROP ROLE mighty")
        run_sql(connection, "ALTER ROLE present CONNECTION LIMIT 5")
    restore(component, database, local_store)
    query = (
        "SELECT rolname, rolsuper, rolcanlogin, rolcreaterole, rolreplication, rolbypassrls, rolconnlimit FROM pg_roles"
    )
    assert rows(database, f"{query} WHERE rolname = 'mighty'") == [("mighty", False, False, False, False, False, -1)]
    assert rows(database, f"{query} WHERE rolname = 'present'") == [("present", False, True, False, False, False, 5)]
    with session(postgres.url()) as connection:
        run_sql(connection, "DROP DATABASE roles")
        run_sql(connection, "DROP ROLE mighty")
        run_sql(connection, "DROP ROLE present")


def test_an_ordinary_owner_without_superuser_can_back_up_and_restore(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    with session(postgres.url()) as connection:
        run_sql(connection, "CREATE ROLE plain LOGIN CREATEDB")
    database = make_database("plainly", "CREATE TABLE t AS SELECT generate_series(1, 10) AS i", owner="plain")
    component = dump(database, local_store)
    with session(database.url) as connection:
        run_sql(connection, "DROP TABLE public.t")
    restore(component, database, local_store)
    assert rows(database, "SELECT count(*) FROM public.t") == [(10,)]
    with session(postgres.url()) as connection:
        run_sql(connection, "DROP DATABASE plainly")
        run_sql(connection, "DROP ROLE plain")


def test_an_ordinary_owner_restores_what_row_level_security_hides_from_him(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    """He may load and count it until the policies are in force."""
    with session(postgres.url()) as connection:
        run_sql(connection, "CREATE ROLE hidden LOGIN CREATEDB")
    database = make_database(
        "hiding",
        "CREATE TABLE t AS SELECT generate_series(1, 10) AS i; ALTER TABLE t ENABLE ROW LEVEL SECURITY;"
        "ALTER TABLE t FORCE ROW LEVEL SECURITY; CREATE POLICY few ON t USING (i <= 3)",
        owner="hidden",
    )
    mighty = Database(database.name, database.url.set(username="postgres"))
    component = dump(mighty, local_store)
    restore(component, database, local_store)
    assert rows(mighty, "SELECT count(*) FROM public.t") == [(10,)]
    assert rows(mighty, "SELECT relrowsecurity, relforcerowsecurity FROM pg_class WHERE relname = 't'") == [
        (True, True)
    ]
    with session(postgres.url()) as connection:
        run_sql(connection, "DROP DATABASE hiding")
        run_sql(connection, "DROP ROLE hidden")


def test_roles_that_a_restore_has_made_are_told_and_go_with_it_where_it_fails(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    database = make_database(
        "peopled",
        "CREATE ROLE comer LOGIN; CREATE ROLE idle; CREATE TABLE t (i integer);"
        "GRANT SELECT ON t TO comer; GRANT INSERT ON t TO idle",
    )
    component = dump(database, local_store)
    with session(postgres.url()) as connection:
        with session(database.url) as inside:
            run_sql(inside, "DROP OWNED BY comer, idle")
        run_sql(connection, "DROP ROLE comer, idle")
    staged = stage(component, database, local_store)
    assert [note for note in staged.notes if "ALTER ROLE" in note and "comer" in note]
    assert not [note for note in staged.notes if "idle" in note]
    assert discard_roles(database, RESTORE, frozenset()) == []
    discard_staging(database, RESTORE)
    assert discard_roles(database, RESTORE, {"comer"}) == ["idle"]
    assert discard_roles(database, "another00000", frozenset()) == []
    assert discard_roles(database, RESTORE, frozenset()) == ["comer"]


def test_who_may_create_roles_restores_onto_a_server_that_has_none_of_them(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    database = make_database(
        "migrated",
        "CREATE ROLE maker LOGIN CREATEDB CREATEROLE; CREATE ROLE former; CREATE ROLE guest; GRANT former TO guest;"
        "CREATE TABLE t AS SELECT 1 AS i; ALTER TABLE t OWNER TO former; GRANT SELECT ON t TO guest;"
        "ALTER DATABASE migrated OWNER TO former",
    )
    component = dump(database, local_store)
    with session(postgres.url()) as connection:
        run_sql(connection, "DROP DATABASE migrated")
        run_sql(connection, "DROP ROLE former, guest")
    restore(component, Database("migrated", database.url.set(username="maker")), local_store)
    assert rows(database, "SELECT tableowner FROM pg_tables WHERE tablename = 't'") == [("former",)]
    assert rows(database, "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'migrated'") == [("former",)]
    assert rows(database, "SELECT pg_has_role('guest', 'former', 'MEMBER')") == [(True,)]
    with session(postgres.url()) as connection:
        run_sql(connection, "DROP DATABASE migrated")
        run_sql(connection, "DROP ROLE former, guest")
        run_sql(connection, "DROP ROLE maker")
