"""What would block the switch of a database or be lost by it is found before anything live is touched."""

import time

from relays import relayed
from round_trip import RESTORE, Make, dump, rows, stage

from athena_backup.errors import AthenaError
from athena_backup.manifest import Component
from athena_backup.postgres.embedded import EmbeddedServer, binaries
from athena_backup.postgres.preflight import preflight_database
from athena_backup.postgres.sessions import Database, run_sql, session
from athena_backup.postgres.staging import discard_staging, facts_of
from athena_backup.store.local import LocalStore
from flows.components import omissions


def faults_of(component: Component, database: Database) -> str:
    found: list[AthenaError] = preflight_database(component, database, RESTORE, [binaries()])
    return "; ".join(str(fault) for fault in found)


def test_a_prepared_transaction(make_database: Make, local_store: LocalStore) -> None:
    database = make_database("prepared", "CREATE TABLE t (i integer)")
    component = dump(database, local_store)
    with session(database.url) as connection:
        for statement in ("BEGIN", "INSERT INTO public.t VALUES (1)", "PREPARE TRANSACTION 'stuck'"):
            run_sql(connection, statement)
        assert "prepared transaction" in faults_of(component, database)
        assert "stuck" in faults_of(component, database)
        run_sql(connection, "ROLLBACK PREPARED 'stuck'")
    assert faults_of(component, database) == ""


def test_a_logical_replication_slot(make_database: Make, local_store: LocalStore) -> None:
    database = make_database("slotted")
    component = dump(database, local_store)
    with session(database.url) as connection:
        run_sql(connection, "SELECT pg_create_logical_replication_slot('keeper', 'test_decoding')")
        assert "replication slot" in faults_of(component, database)
        run_sql(connection, "SELECT pg_drop_replication_slot('keeper')")


def test_a_subscription(make_database: Make, local_store: LocalStore) -> None:
    database = make_database("subscribed")
    component = dump(database, local_store)
    with session(database.url) as connection:
        run_sql(connection, "CREATE SUBSCRIPTION feed CONNECTION 'dbname=x' PUBLICATION p WITH (connect = false)")
        assert "subscriptions (feed)" in faults_of(component, database)
        run_sql(connection, "ALTER SUBSCRIPTION feed SET (slot_name = NONE)")
        run_sql(connection, "DROP SUBSCRIPTION feed")


def test_a_role_that_may_not_create_databases_and_an_owner_that_it_is_not(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    with session(postgres.url()) as connection:
        run_sql(connection, "CREATE ROLE weak LOGIN")
    database = make_database("strong", "CREATE TABLE t (i integer)")
    component = dump(database, local_store)
    faults = faults_of(component, Database("strong", database.url.set(username="weak")))
    assert "may not create databases" in faults
    assert "belongs to postgres" in faults
    with session(postgres.url()) as connection:
        run_sql(connection, "DROP ROLE weak")


def test_a_tablespace_that_the_destination_lacks_or_gives_no_right_in(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    """Without it the restore would fail late: the tables of the set are made in it by name."""
    with session(postgres.url(), {"allow_in_place_tablespaces": "on"}) as connection:
        run_sql(connection, "CREATE ROLE tenant LOGIN CREATEDB")
        run_sql(connection, "CREATE TABLESPACE attic LOCATION ''")
    try:
        database = make_database(
            "spread",
            "CREATE TABLE t (i integer) TABLESPACE attic; CREATE TABLE elsewhere (i integer);"
            " ALTER DATABASE spread OWNER TO tenant",
        )
        component = dump(database, local_store)
        assert facts_of(component).tablespaces == ("attic",)
        tenant = Database("spread", database.url.set(username="tenant"))
        assert 'GRANT CREATE ON TABLESPACE "attic" TO "tenant"' in faults_of(component, tenant)
        with session(postgres.url()) as connection:
            run_sql(connection, "GRANT CREATE ON TABLESPACE attic TO tenant")
        assert faults_of(component, tenant) == ""
        discard_staging(database, RESTORE)
        staged = stage(component, database, local_store)
        inside = Database("inside", database.url.set(database=staged.name))
        assert rows(inside, "SELECT tablespace FROM pg_tables WHERE tablename = 't'") == [("attic",)]
        discard_staging(database, RESTORE)
    finally:
        with session(postgres.url()) as connection:
            run_sql(connection, "DROP DATABASE IF EXISTS spread")
            run_sql(connection, "DROP TABLESPACE attic")
            run_sql(connection, "DROP ROLE tenant")
    assert (
        faults_of(component, Database("other", database.url.set(database="other")))
        == "the destination lacks the tablespace attic (create it, then try again)"
    )


def test_a_set_from_a_newer_server(make_database: Make, local_store: LocalStore) -> None:
    database = make_database("newer")
    component = dump(database, local_store)
    assert component.server is not None
    newer = component.model_copy(update={"server": component.server.model_copy(update={"version": 190000})})
    assert "PostgreSQL 19" in faults_of(newer, database)


def test_an_extension_that_the_destination_lacks(make_database: Make, local_store: LocalStore) -> None:
    database = make_database("extended")
    component = dump(database, local_store)
    assert component.database is not None
    extension = component.database.extensions[0].model_copy(update={"name": "postgis"})
    facts = component.database.model_copy(update={"extensions": (extension,)})
    assert "postgis" in faults_of(component.model_copy(update={"database": facts}), database)


def test_an_extension_that_can_be_made_only_in_a_database_of_its_name(
    make_database: Make, local_store: LocalStore
) -> None:
    """It has to be refused before anything is loaded, and where the way out is said; the backup's own message says so before."""
    database = make_database("timed")
    component = dump(database, local_store)
    assert component.database is not None
    extension = component.database.extensions[0].model_copy(update={"name": "pg_cron"})
    facts = component.database.model_copy(update={"extensions": (extension,)})
    bound = component.model_copy(update={"database": facts})
    said = faults_of(bound, database)
    assert "pg_cron can be made only in the one database" in said
    assert "RESTORE.md" in said
    assert omissions([component]) == []
    assert [line for line in omissions([bound]) if "pg_cron" in line and "RESTORE.md" in line]


def test_a_session_that_an_ordinary_owner_may_not_end(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    with session(postgres.url()) as connection:
        run_sql(connection, "CREATE ROLE humble LOGIN CREATEDB")
    database = make_database("watched", "CREATE TABLE t (i integer)", owner="humble")
    component = dump(database, local_store)
    with session(database.url.set(username="postgres")) as other:
        pid = run_sql(other, "SELECT pg_backend_pid()").scalar_one()
        assert f"may not terminate (pid {pid} of postgres)" in faults_of(component, database)
    with session(postgres.url()) as connection:
        run_sql(connection, "DROP DATABASE watched WITH (FORCE)")
        run_sql(connection, "DROP ROLE humble")


def test_a_background_worker_bound_to_the_database(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    publisher = make_database("speaking", "CREATE TABLE t (i integer); CREATE PUBLICATION p FOR TABLE t")
    database = make_database("hearing", "CREATE TABLE t (i integer)")
    component = dump(database, local_store)
    with session(publisher.url) as source, session(database.url) as connection:
        run_sql(source, "SELECT pg_create_logical_replication_slot('heard', 'pgoutput')")
        run_sql(
            connection,
            f"CREATE SUBSCRIPTION feed CONNECTION 'host=127.0.0.1 port={postgres.port} dbname=speaking user=postgres'"
            " PUBLICATION p WITH (create_slot = false, slot_name = 'heard')",
        )
        try:
            deadline = time.monotonic() + 20
            while "background worker" not in (found := faults_of(component, database)):
                assert time.monotonic() < deadline, found
                time.sleep(0.1)
            assert "logical replication apply worker, pid " in found
        finally:
            run_sql(connection, "ALTER SUBSCRIPTION feed DISABLE")
            run_sql(connection, "ALTER SUBSCRIPTION feed SET (slot_name = NONE)")
            run_sql(connection, "DROP SUBSCRIPTION feed")
            while run_sql(source, "SELECT count(*) FROM pg_replication_slots WHERE active").scalar_one():
                time.sleep(0.1)
            run_sql(source, "SELECT pg_drop_replication_slot('heard')")


def test_a_connection_pooler(make_database: Make, local_store: LocalStore, postgres: EmbeddedServer) -> None:
    """A lock of a session, and its settings, would be another client's at the next statement."""
    database = make_database("pooled")
    component = dump(database, local_store)
    with relayed(postgres.port, is_pooler=True) as port:
        assert "reached through a connection pooler" in faults_of(
            component, Database("pooled", database.url.set(port=port))
        )
    admin = Database("admin", postgres.url())
    assert rows(admin, "SELECT datname FROM pg_database WHERE datname ~ '^pooled__athena'") == [], "nothing was made"


def test_two_components_that_restore_into_one_database(make_database: Make, local_store: LocalStore) -> None:
    database = make_database("shared_by_two")
    component = dump(database, local_store)
    assert faults_of(component, database) == ""
    twin = Database("twin", database.url.set(host="localhost"))
    assert "another component restores into database shared_by_two too" in faults_of(component, twin)
