"""A dump is believed only when pg_dump ended well, said nothing unknown, and both holders lived to its last byte."""

import contextlib
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from athena_backup.errors import FinalError
from athena_backup.manifest import Component, DatabaseFacts
from athena_backup.names import SetId
from athena_backup.operation import Operation
from athena_backup.pipeline import read_stream
from athena_backup.postgres import dump
from athena_backup.postgres.clients import find_client
from athena_backup.postgres.cut import Cut, hold_cut
from athena_backup.postgres.dump import write_database, write_globals
from athena_backup.postgres.embedded import EmbeddedServer, binaries, embedded_server
from athena_backup.postgres.sessions import Database
from athena_backup.store import Entry
from athena_backup.store.local import LocalStore

SET = SetId.parse("app/2023-02-02t16-00-00", "app")


def connected(postgres: EmbeddedServer, database: str, **options: str) -> "psycopg.Connection[tuple[object, ...]]":
    defaults = {"host": "127.0.0.1", "port": str(postgres.port), "dbname": database, "user": "postgres"}
    return psycopg.connect(make_conninfo(**{**defaults, **options}), autocommit=True)


@pytest.fixture
def database(postgres: EmbeddedServer) -> Iterator[Database]:
    name = f"dump_{uuid4().hex[:10]}"
    with connected(postgres, "postgres") as admin:
        admin.execute(f"CREATE DATABASE {name}")
        yield Database("gitserver", postgres.url(name))
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def owner(postgres: EmbeddedServer, database: Database) -> Iterator[Database]:
    """The same database as its owner reaches it: an ordinary role."""
    role = f"owner_{uuid4().hex[:8]}"
    with connected(postgres, database.database) as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN; ALTER DATABASE {database.database} OWNER TO {role}")
        yield Database(database.name, postgres.url(database.database, user=role))
        admin.execute(f"ALTER DATABASE {database.database} OWNER TO postgres; DROP OWNED BY {role} CASCADE")
        admin.execute(f"DROP ROLE {role}")


def back_up(
    database: Database, store: LocalStore, cut: Cut, operation: Operation | None = None, first: Path | None = None
) -> Component:
    directories = [binaries()] if first is None else [first, binaries()]
    return write_database(
        *(database, cut, store, SET, "run", operation or Operation()),
        client_directories=directories,
        bulk_bytes=1 << 50,  # what COPY reads is test_postgres_copy's
    )


def facts(component: Component) -> DatabaseFacts:
    assert component.database is not None
    return component.database


@contextlib.contextmanager
def restored(
    component: Component, store: LocalStore, postgres: EmbeddedServer
) -> Iterator["psycopg.Connection[tuple[object, ...]]"]:
    """The component in a new database, by stock pg_restore."""
    name = f"restored_{uuid4().hex[:10]}"
    [stream] = component.streams
    dumped = b"".join(read_stream(component.name, stream.parts, store, Operation()))
    with connected(postgres, "postgres") as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        subprocess.run(
            [
                *(binaries() / "pg_restore", "--exit-on-error", "-h", "127.0.0.1", "-p", str(postgres.port)),
                *("-U", "postgres", "-d", name),
            ],
            input=dumped,
            check=True,
        )
        with connected(postgres, name) as connection:
            yield connection
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def value(connection: "psycopg.Connection[tuple[object, ...]]", sql: str) -> object:
    row = connection.execute(sql).fetchone()
    assert row is not None
    return row[0]


class MeddledStore(LocalStore):
    """A store in which something happens to the server or to pg_dump as soon as the first bytes have come."""

    def __init__(self, place: str, meddle: Callable[[], None]) -> None:
        super().__init__(place)
        self._meddle = meddle

    def write(self, key: str, chunks: Iterable[bytes]) -> Entry:
        def meddled() -> Iterator[bytes]:
            for number, chunk in enumerate(chunks):
                yield chunk
                if number == 0:
                    self._meddle()

        return super().write(key, meddled())


def fill(postgres: EmbeddedServer, database: Database) -> None:
    """Some 40 MB that don't compress: pg_dump is far from its end when the first part of it is stored."""
    with connected(postgres, database.database) as admin:
        admin.execute(
            "CREATE TABLE t AS SELECT i, md5(i::text) || md5((i + 1)::text) x FROM generate_series(1, 500000) i"
        )


def test_the_dump_restores_and_equals_what_the_manifest_says_while_writers_write(
    postgres: EmbeddedServer, database: Database, local_store: LocalStore
) -> None:
    with connected(postgres, database.database) as admin:
        admin.execute('CREATE TABLE "odd ""name" (id bigint GENERATED ALWAYS AS IDENTITY, x text)')
        admin.execute("CREATE TABLE p (i int) PARTITION BY RANGE (i); CREATE TABLE p1 PARTITION OF p DEFAULT")
        admin.execute("INSERT INTO p SELECT generate_series(1, 30)")
        admin.execute('CREATE SCHEMA "s\'.x"; CREATE SEQUENCE "s\'.x"."a""b\\c"; SELECT lo_create(0)')
        admin.execute("""SELECT setval('"s''.x"."a""b\\c"', 42)""")
        stop = threading.Event()

        def write() -> None:
            with connected(postgres, database.database) as writer:
                while not stop.is_set():
                    writer.execute('INSERT INTO "odd ""name" (x) SELECT md5(i::text) FROM generate_series(1, 10) i')

        thread = threading.Thread(target=write)
        thread.start()
        try:
            with hold_cut([database], Operation()) as cut:
                component = back_up(database, local_store, cut)
        finally:
            stop.set()
            thread.join()
    with restored(component, local_store, postgres) as copy:
        assert {(table.schema_name, table.name) for table in facts(component).tables} == {
            ("public", 'odd "name'),
            ("public", "p1"),
        }
        for table in facts(component).tables:
            name = table.name.replace('"', '""')
            assert value(copy, f'SELECT count(*) FROM ONLY "{table.schema_name}"."{name}"') == table.rows
        assert facts(component).large_objects == value(copy, "SELECT count(*) FROM pg_largeobject_metadata") == 1
        found = {(one.schema_name, one.name): (one.last_value, one.is_called) for one in facts(component).sequences}
        assert found["s'.x", 'a"b\\c'] == (42, True)
        assert found.keys() == {("s'.x", 'a"b\\c'), ("public", 'odd "name_id_seq')}
        for (schema, name), state in found.items():
            quoted = f'"{schema}"."{name.replace(chr(34), chr(34) * 2)}"'
            assert copy.execute(f"SELECT last_value, is_called FROM {quoted}").fetchone() == state


def test_a_truncate_in_the_middle_waits_and_every_row_is_in_the_dump(
    postgres: EmbeddedServer, database: Database, local_store: LocalStore
) -> None:
    fill(postgres, database)
    truncating = threading.Thread(target=lambda: run(postgres, database, "TRUNCATE t"))
    with hold_cut([database], Operation()) as cut:

        def meddle() -> None:
            truncating.start()
            deadline = time.monotonic() + 60
            while not cut.of(database.name).waiting():
                assert time.monotonic() < deadline
                threading.Event().wait(0.02)

        component = back_up(database, MeddledStore(local_store.location.place, meddle), cut)
    truncating.join()
    with restored(component, local_store, postgres) as copy:
        assert value(copy, "SELECT count(*) FROM t") == 500_000 == facts(component).tables[0].rows
    with connected(postgres, database.database) as live:
        assert value(live, "SELECT count(*) FROM t") == 0


def run(postgres: EmbeddedServer, database: Database, sql: str) -> None:
    with connected(postgres, database.database) as connection:
        connection.execute(sql)


def test_ddl_in_front_of_pg_dump_fails_the_component_and_is_named(
    postgres: EmbeddedServer, database: Database, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump, "_LOCK_WAIT_MILLISECONDS", 300)
    run(postgres, database, "CREATE TABLE t (i int)")
    truncating = threading.Thread(target=lambda: run(postgres, database, "TRUNCATE t /* in front */"))
    with hold_cut([database], Operation()) as cut:
        truncating.start()
        deadline = time.monotonic() + 60
        while not cut.of(database.name).waiting():
            assert time.monotonic() < deadline
            threading.Event().wait(0.02)
        with pytest.raises(FinalError, match=r"pid \d+ .*TRUNCATE t /\* in front \*/"):
            back_up(database, local_store, cut)
    truncating.join()
    assert list(local_store.entries("")) == []


def test_a_pg_dump_killed_half_way_is_an_error_and_leaves_nothing_to_see(
    postgres: EmbeddedServer, database: Database, local_store: LocalStore
) -> None:
    fill(postgres, database)
    store = MeddledStore(local_store.location.place, lambda: os.kill(child_named("pg_dump"), signal.SIGKILL))
    with hold_cut([database], Operation()) as cut, pytest.raises(FinalError, match="SIGKILL"):
        back_up(database, store, cut)
    assert list(local_store.entries("")) == []


def child_named(program: str) -> int:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = stat.read_text().partition(" (")
            name, _, state = rest.rpartition(") ")
            if name == program and int(state.split()[1]) == os.getpid():
                return int(pid)
    raise AssertionError(f"no child {program}")


@pytest.mark.parametrize("which", ["locks", "reader"])
def test_a_holder_lost_half_way_fails_the_dump(
    postgres: EmbeddedServer, database: Database, local_store: LocalStore, which: str
) -> None:
    fill(postgres, database)
    with hold_cut([database], Operation()) as cut, connected(postgres, "postgres") as admin:
        pid = getattr(cut.of(database.name), f"{which}_pid")

        def terminate() -> None:
            admin.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))

        store = MeddledStore(local_store.location.place, terminate)
        with pytest.raises(FinalError, match="held the snapshot was lost"):
            back_up(database, store, cut)
    assert list(local_store.entries("")) == []


def test_a_holder_lost_while_pg_dump_says_nothing_fails_the_dump_at_once(
    postgres: EmbeddedServer, database: Database, local_store: LocalStore, tmp_path: Path
) -> None:
    """As it does while it waits for a server; this one waits for ever."""
    silent, begun = tmp_path / "bin" / "pg_dump", tmp_path / "begun"
    silent.parent.mkdir()
    silent.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {binaries() / "pg_dump"} "$@"\ntouch {begun}\nexec sleep 600\n'
    )
    silent.chmod(0o755)
    (silent.parent / "pg_restore").symlink_to(binaries() / "pg_restore")
    with hold_cut([database], Operation()) as cut, connected(postgres, "postgres") as admin:

        def terminate() -> None:
            while not begun.exists():
                time.sleep(0.01)
            admin.execute("SELECT pg_terminate_backend(%s, 5000)", (cut.of(database.name).locks_pid,))

        terminating = threading.Thread(target=terminate)
        terminating.start()
        with pytest.raises(FinalError, match="held the snapshot was lost"):
            back_up(database, local_store, cut, first=silent.parent, operation=Operation.lasting(60))
        terminating.join()


def test_rows_that_row_level_security_hides_are_an_error_and_never_missing(
    postgres: EmbeddedServer, owner: Database, local_store: LocalStore
) -> None:
    with connected(postgres, owner.database, user=str(owner.url.username)) as own:
        own.execute("CREATE SCHEMA s; CREATE TABLE s.t AS SELECT generate_series(1, 10) i")
        own.execute("ALTER TABLE s.t ENABLE ROW LEVEL SECURITY; ALTER TABLE s.t FORCE ROW LEVEL SECURITY")
        own.execute("CREATE POLICY few ON s.t USING (i <= 3)")
    with hold_cut([owner], Operation()) as cut, pytest.raises(Exception, match="row-level security"):
        back_up(owner, local_store, cut)
    assert list(local_store.entries("")) == []


@pytest.mark.parametrize("kind", ["VIEW", "SEQUENCE"])
def test_what_can_not_be_locked_and_is_dropped_meanwhile_is_told_as_that(
    postgres: EmbeddedServer, database: Database, local_store: LocalStore, kind: str
) -> None:
    run(postgres, database, f"CREATE {kind} public.passing{' AS SELECT 1' if kind == 'VIEW' else ''}")
    with hold_cut([database], Operation()) as cut:
        run(postgres, database, f"DROP {kind} public.passing")
        with pytest.raises(FinalError, match="a view or sequence was dropped while") as caught:
            back_up(database, local_store, cut)
    assert "outside of backups" in str(caught.value)


def test_settings_of_the_database_do_not_change_what_is_dumped(
    postgres: EmbeddedServer, database: Database, local_store: LocalStore
) -> None:
    run(postgres, database, "CREATE TABLE f AS SELECT 0.1::float8 + 0.2::float8 AS x, '1 day 2 hours'::interval AS y")
    for setting in ("extra_float_digits = -15", "intervalstyle = 'sql_standard'", "search_path = 'nowhere'"):
        run(postgres, database, f"ALTER DATABASE {database.database} SET {setting}")
    with hold_cut([database], Operation()) as cut:
        component = back_up(database, local_store, cut)
    with restored(component, local_store, postgres) as copy:
        assert copy.execute("SELECT x, y::text FROM public.f").fetchone() == (0.30000000000000004, "1 day 02:00:00")
    assert ("extra_float_digits", "-15") in {(one.name, one.value) for one in facts(component).settings}


def test_what_an_owner_s_dump_leaves_out_stands_in_the_manifest(
    postgres: EmbeddedServer, owner: Database, local_store: LocalStore
) -> None:
    with connected(postgres, owner.database) as admin:
        admin.execute("CREATE SUBSCRIPTION far CONNECTION 'host=nowhere' PUBLICATION p WITH (connect = false)")
        try:
            with hold_cut([owner], Operation()) as cut:
                component = back_up(owner, local_store, cut)
        finally:
            admin.execute("ALTER SUBSCRIPTION far DISABLE; ALTER SUBSCRIPTION far SET (slot_name = NONE)")
            admin.execute("DROP SUBSCRIPTION far")
    assert facts(component).omitted == ("subscriptions not dumped because current user is not a superuser",)
    assert facts(component).owner == owner.url.username


def test_options_of_user_mappings_that_an_owner_may_not_see_stand_in_the_manifest_as_omitted(
    postgres: EmbeddedServer, owner: Database, local_store: LocalStore
) -> None:
    with connected(postgres, owner.database) as admin:
        admin.execute("CREATE EXTENSION postgres_fdw; CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw")
        admin.execute("CREATE USER MAPPING FOR postgres SERVER far OPTIONS (password 'hush')")
        admin.execute(f"GRANT USAGE ON FOREIGN SERVER far TO {owner.url.username}")
        admin.execute(f"CREATE USER MAPPING FOR {owner.url.username} SERVER far OPTIONS (password 'seen')")
        dumped = {}
        for name, database in (("owner", owner), ("superuser", Database("all", owner.url.set(username="postgres")))):
            with hold_cut([database], Operation()) as cut:
                dumped[name] = back_up(database, local_store, cut)
        admin.execute("DROP EXTENSION postgres_fdw CASCADE")
    assert facts(dumped["superuser"]).omitted == ()
    [omitted] = facts(dumped["owner"]).omitted
    assert "user mapping of postgres on server far" in omitted
    [stream] = dumped["owner"].streams
    assert b"hush" not in b"".join(read_stream("gitserver", stream.parts, local_store, Operation()))


@pytest.mark.parametrize(
    ("line", "message"), [("pg_dump: warning: a strange thing", "a strange thing"), ("gibberish", "gibberish")]
)
def test_a_warning_that_is_not_known_fails_the_dump(
    postgres: EmbeddedServer, database: Database, local_store: LocalStore, tmp_path: Path, line: str, message: str
) -> None:
    saying = tmp_path / "bin" / "pg_dump"
    saying.parent.mkdir()
    saying.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo \'{line}\' >&2\nexec {binaries() / "pg_dump"} "$@"\n')
    saying.chmod(0o755)
    (saying.parent / "pg_restore").symlink_to(binaries() / "pg_restore")
    with hold_cut([database], Operation()) as cut, pytest.raises(FinalError, match=message):
        back_up(database, local_store, cut, first=saying.parent)
    assert list(local_store.entries("")) == []


def test_a_process_with_thousands_of_open_files_can_still_read_a_dump(
    postgres: EmbeddedServer, database: Database, local_store: LocalStore
) -> None:
    """As one that holds all packs of a repository open: select(2) knows no descriptor from 1024 on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    run(postgres, database, "CREATE TABLE t AS SELECT 7 AS i")
    with contextlib.ExitStack() as opened, hold_cut([database], Operation()) as cut:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4_096)), hard))
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1_100):
            opened.enter_context(open(os.devnull))
        component = back_up(database, local_store, cut)
        write_globals(cut.of(database.name), local_store, SET, Operation(), [binaries()])
    with restored(component, local_store, postgres) as copy:
        assert copy.execute("SELECT i FROM t").fetchall() == [(7,)]


def test_a_pg_dump_that_is_too_old_is_refused_with_what_to_do() -> None:
    with pytest.raises(FinalError, match=r"version 99 or newer is needed: .*pg_dump is 18.*install the PostgreSQL 99"):
        find_client("pg_dump", 990_000, [binaries()])


def test_rows_of_an_extensions_configuration_are_dumped_and_its_other_tables_are_not_touched(
    local_store: LocalStore, tmp_path: Path
) -> None:
    extension = tmp_path / "extension"
    extension.mkdir()
    (extension / "kept.control").write_text("default_version = '1'\nschema = kept\n")
    (extension / "kept--1.sql").write_text(
        "CREATE TABLE hidden (i int); CREATE TABLE config (i int, ours bool); INSERT INTO config VALUES (0, false);"
        "SELECT pg_catalog.pg_extension_config_dump('config', 'WHERE ours'); REVOKE ALL ON hidden FROM PUBLIC"
    )
    with embedded_server(tmp_path / "data", {"extension_control_path": f"$system:{tmp_path}"}) as server:
        with connected(server, "postgres") as admin:
            admin.execute("CREATE ROLE plain LOGIN")
            admin.execute("CREATE DATABASE extended OWNER plain")
        with connected(server, "extended") as admin:
            admin.execute("CREATE EXTENSION kept; INSERT INTO kept.config VALUES (7, true)")
            admin.execute("GRANT USAGE ON SCHEMA kept TO plain; GRANT SELECT ON kept.config TO plain")
        database = Database("extended", server.url("extended", user="plain"))
        with hold_cut([database], Operation()) as cut:
            component = back_up(database, local_store, cut)
        with restored(component, local_store, server) as copy:
            assert copy.execute("SELECT i, ours FROM kept.config ORDER BY i").fetchall() == [(0, False), (7, True)]
