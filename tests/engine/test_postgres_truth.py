"""What is read is what stood there at the cut, whatever happens meanwhile and however a database is set; else the backup says so."""

import asyncio
import socket

import asyncpg
import pytest
from round_trip import ALL_BY_COPY, SET, Make, dump, restore, rows, sql, stage
from sqlalchemy import URL

from athena_backup.crew import Turn
from athena_backup.errors import AthenaError, DeniedError, FinalError, UnavailableError
from athena_backup.manifest import Component
from athena_backup.operation import Operation
from athena_backup.postgres.bulk import DUMP_BYTES, BulkTable, bulk_tables, worth_copying
from athena_backup.postgres.copy_in import load_ranges
from athena_backup.postgres.copy_login import connect, unreachable
from athena_backup.postgres.copy_out import CopySessions, RangeReading
from athena_backup.postgres.cut import hold_cut
from athena_backup.postgres.dump import write_database
from athena_backup.postgres.embedded import EmbeddedServer, binaries
from athena_backup.postgres.sessions import Database, run_sql, session
from athena_backup.store.local import LocalStore


def dump_after(database: Database, store: LocalStore, meanwhile: str, **sizes: int) -> Component:
    """A backup in which something is done between the cut and the first read."""
    with hold_cut([database], Operation()) as cut:
        sql(database, meanwhile)
        return write_database(
            *(database, cut, store, SET, "run", Operation()), client_directories=[binaries()], **sizes
        )


WAYS = pytest.mark.parametrize("sizes", [{}, ALL_BY_COPY], ids=["by pg_dump", "by COPY"])


@WAYS
def test_what_is_written_after_the_cut_is_not_in_the_backup(
    make_database: Make, local_store: LocalStore, sizes: dict[str, int]
) -> None:
    database = make_database("later", "CREATE TABLE t AS SELECT i, md5(i::text) x FROM generate_series(1, 5000) i")
    meanwhile = "INSERT INTO t SELECT 0, 'late' FROM generate_series(1, 5000); UPDATE t SET x = 'changed' WHERE i < 100"
    component = dump_after(database, local_store, meanwhile, **sizes)
    restore(component, database, local_store)
    query = "SELECT count(*), sum(i), count(*) FILTER (WHERE x <> md5(i::text)) FROM public.t"
    assert rows(database, query) == [(5000, 12_502_500, 0)]


@WAYS
def test_a_schema_that_takes_anothers_name_meanwhile_fails_the_backup(
    make_database: Make, local_store: LocalStore, sizes: dict[str, int]
) -> None:
    make = "CREATE SCHEMA {0}; CREATE TABLE {0}.t AS SELECT i, '{0}' x FROM generate_series(1, {1}) i;"
    database = make_database("renamed", make.format("live", 1000) + make.format("next", 2000))
    swap = "ALTER SCHEMA live RENAME TO old; ALTER SCHEMA next RENAME TO live; ALTER SCHEMA old RENAME TO next"
    with pytest.raises(FinalError, match=r"something was renamed while the database was read: live\.t, next\.t"):
        dump_after(database, local_store, swap, **sizes)


def test_a_schema_that_loses_its_name_meanwhile_is_named(make_database: Make, local_store: LocalStore) -> None:
    database = make_database("gone", "CREATE SCHEMA live; CREATE TABLE live.t AS SELECT 1 AS i")
    with pytest.raises(FinalError, match=r"something was renamed while the database was read: live\.t"):
        dump_after(database, local_store, "ALTER SCHEMA live RENAME TO old")


@WAYS
def test_an_enum_value_that_is_renamed_meanwhile_fails_the_backup(
    make_database: Make, local_store: LocalStore, sizes: dict[str, int]
) -> None:
    make = "CREATE TYPE mood AS ENUM ('a', 'b'); CREATE TABLE t AS SELECT 'a'::mood FROM generate_series(1, 1000)"
    database = make_database("relabelled", make)
    with pytest.raises(FinalError, match="renamed while the database was read: the enum value 'a'"):
        dump_after(database, local_store, "ALTER TYPE mood RENAME VALUE 'a' TO 'z'", **sizes)


@WAYS
@pytest.mark.parametrize(
    "meanwhile",
    [
        "ALTER TYPE addr ADD ATTRIBUTE zip text",
        "ALTER TYPE addr DROP ATTRIBUTE town",
        "ALTER TYPE addr RENAME TO place",
        "CREATE SCHEMA other; ALTER TYPE addr SET SCHEMA other",
    ],
)
def test_a_type_that_is_altered_meanwhile_fails_the_backup(
    make_database: Make, local_store: LocalStore, sizes: dict[str, int], meanwhile: str
) -> None:
    """No table's lock keeps it, and a row of it is written as it is then, not as it was at the cut."""
    make = (
        "CREATE TYPE addr AS (street text, town text);"
        " CREATE TABLE t AS SELECT ARRAY[('a', 'b')::addr] AS a FROM generate_series(1, 1000)"
    )
    database = make_database("altered", make)
    with pytest.raises(FinalError, match=r"renamed while the database was read: the type public\.addr"):
        dump_after(database, local_store, meanwhile, **sizes)


HOSTILE = """
CREATE SCHEMA evil; CREATE FUNCTION evil.boom(pg_catalog.text) RETURNS bool LANGUAGE plpgsql AS $$BEGIN RAISE 'boom'; END$$;
CREATE DOMAIN evil.text AS pg_catalog.text CHECK (evil.boom(VALUE));
CREATE FUNCTION evil.current_schema() RETURNS pg_catalog.text LANGUAGE plpgsql AS $$BEGIN RAISE 'boom'; END$$;
CREATE FUNCTION evil.lower(pg_catalog.text) RETURNS pg_catalog.text LANGUAGE plpgsql AS $$BEGIN RAISE 'boom'; END$$;
CREATE TABLE evil.pg_settings (name pg_catalog.text);
CREATE FUNCTION evil.unnest(anyarray) RETURNS SETOF anyelement LANGUAGE plpgsql AS $$BEGIN RAISE 'boom'; END$$;
CREATE TABLE public.t AS SELECT i FROM generate_series(1, 1000) i;
ALTER DATABASE hostile SET search_path = evil, pg_catalog;
"""


@WAYS
def test_what_a_database_puts_into_its_search_path_is_never_called(
    make_database: Make, local_store: LocalStore, sizes: dict[str, int]
) -> None:
    database = make_database("hostile", HOSTILE)
    component = dump(database, local_store, **sizes)
    restore(component, database, local_store)
    assert rows(database, "SELECT count(*) FROM public.t") == [(1000,)]


SET_OTHERWISE = """
CREATE TABLE t (i interval, d date, f float8, m money, a text[], x xml, o oid DEFAULT 1, ts tsvector);
INSERT INTO t VALUES ('1 mon 2 days -03:00:00.5', '2026-02-01', 0.1::float8 + 0.2, 1234.56, ARRAY['a', NULL], '<a/>');
INSERT INTO t (i) VALUES ('-1 day -02:03:04');
ALTER DATABASE otherwise SET intervalstyle = 'sql_standard'; ALTER DATABASE otherwise SET datestyle = 'SQL, DMY';
ALTER DATABASE otherwise SET extra_float_digits = -15; ALTER DATABASE otherwise SET array_nulls = off;
ALTER DATABASE otherwise SET xmloption = 'document'; ALTER DATABASE otherwise SET lc_monetary = 'MONETARY';
"""


@WAYS
def test_how_a_database_is_set_changes_no_value(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer, sizes: dict[str, int]
) -> None:
    with session(postgres.url()) as connection:
        locales = (
            run_sql(connection, "SELECT collname FROM pg_collation WHERE collname ~ '^de_DE' LIMIT 1").scalars().all()
        )
    setting = SET_OTHERWISE.replace("MONETARY", [*locales, "C"][0])
    without_xml = not _has_xml(postgres)
    if without_xml:
        setting = setting.replace(" x xml,", " x text,").replace(
            "ALTER DATABASE otherwise SET xmloption = 'document'; ", ""
        )
    database = make_database("otherwise", setting)
    query = "SELECT i::text, d, f, m::numeric, a[2] IS NULL, x::text FROM public.t"
    before = rows(database, query)
    component = dump(database, local_store, **sizes)
    restore(component, database, local_store)
    assert rows(database, query) == before
    assert before[0][4] is True


@WAYS
def test_null_in_an_array_stays_null_however_a_role_is_set(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer, sizes: dict[str, int]
) -> None:
    with session(postgres.url()) as connection:
        run_sql(connection, "CREATE ROLE without_nulls LOGIN CREATEDB")
        run_sql(connection, "ALTER ROLE without_nulls SET array_nulls = off")
    try:
        # A type of its own: what has a binary form is not read from texts.
        make = "CREATE TYPE mood AS ENUM ('a'); CREATE TABLE t (a mood[], b text[]); INSERT INTO t VALUES (ARRAY['a', NULL]::mood[], ARRAY[NULL])"
        database = make_database("listed", make, owner="without_nulls")
        component = dump(database, local_store, **sizes)
        restore(component, database, local_store)
        assert rows(database, "SELECT a[1]::text, a[2] IS NULL, b[1] IS NULL FROM public.t") == [("a", True, True)]
    finally:
        with session(postgres.url()) as connection:
            run_sql(connection, "DROP DATABASE IF EXISTS listed WITH (FORCE)")
            run_sql(connection, "DROP ROLE without_nulls")


def _has_xml(postgres: EmbeddedServer) -> bool:
    try:
        with session(postgres.url()) as connection:
            run_sql(connection, "SELECT '<a/>'::xml")
    except AthenaError:
        return False
    return True


def test_a_table_that_hides_rows_from_its_own_owner_fails_the_backup_by_copy(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    with session(postgres.url()) as connection:
        run_sql(connection, "CREATE ROLE forced LOGIN")
    try:
        make = (
            "CREATE TABLE t AS SELECT i FROM generate_series(1, 3000) i; ALTER TABLE t ENABLE ROW LEVEL SECURITY;"
            "ALTER TABLE t FORCE ROW LEVEL SECURITY; CREATE POLICY part ON t USING (i < 100)"
        )
        database = make_database("forced", make, owner="forced")
        with hold_cut([database], Operation()) as cut:
            held = cut.of(database.name)
            [table] = bulk_tables(held, {}, bulk_bytes=0)
            reading = RangeReading(CopySessions(held, []), table.ranges(1 << 30)[0], Turn(1, lambda: None))
            with pytest.raises(DeniedError, match="row-level security"):
                list(reading.chunks(Operation()))
    finally:
        with session(postgres.url()) as connection:
            run_sql(connection, "DROP DATABASE IF EXISTS forced WITH (FORCE)")
            run_sql(connection, "DROP ROLE forced")


@WAYS
@pytest.mark.parametrize(
    ("key", "value"),
    [("mood", "{}"), ("mood[]", "ARRAY[{}]"), ("pair", "ROW({}, 1)::pair")],
    ids=["alone", "array", "row"],
)
def test_partitions_by_the_hash_of_an_enum_come_back_though_their_rows_move(
    make_database: Make, local_store: LocalStore, sizes: dict[str, int], key: str, value: str
) -> None:
    database = make_database(
        "hashed",
        "CREATE TYPE mood AS ENUM ('a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'); CREATE TYPE pair AS (m mood, i int);"
        f"CREATE TABLE parted (m {key}, i int) PARTITION BY HASH (m);"
        "CREATE TABLE parted_0 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        "CREATE TABLE parted_1 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 1) PARTITION BY HASH (m);"
        "CREATE TABLE parted_1_0 PARTITION OF parted_1 FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        "CREATE TABLE parted_1_1 PARTITION OF parted_1 FOR VALUES WITH (MODULUS 2, REMAINDER 1);"
        "CREATE TABLE beside AS SELECT i FROM generate_series(1, 3000) i;"
        f"INSERT INTO parted SELECT {value.format('(enum_range(NULL::mood))[1 + i % 8]')}, i FROM generate_series(1, 5000) i",
    )
    query = "SELECT m::text, i FROM public.parted ORDER BY i"
    before = rows(database, query)
    component = dump(database, local_store, **sizes)
    restore(component, database, local_store)
    assert rows(database, query) == before


DEPENDENT = """
CREATE TABLE a_rates (id int PRIMARY KEY, r int); INSERT INTO a_rates SELECT i, i * 10 FROM generate_series(1, 100) i;
CREATE FUNCTION rate(i int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT r FROM public.a_rates WHERE id = i';
CREATE TABLE orders (c int CHECK (public.rate(c) > 0), g int GENERATED ALWAYS AS (public.rate(c)) STORED, x text);
INSERT INTO orders (c, x) SELECT 1 + i % 100, md5(i::text) FROM generate_series(1, 5000) i;
CREATE DOMAIN rated AS int CHECK (public.rate(VALUE) > 0); CREATE DOMAIN twice AS rated; CREATE TYPE pair AS (a int, b twice);
CREATE TABLE rated_orders AS SELECT c::twice, ARRAY[c::rated] cs, ROW(1, c)::pair p FROM orders LIMIT 10;
CREATE FUNCTION knows(int, int) RETURNS bool LANGUAGE sql AS 'SELECT EXISTS (SELECT FROM public.a_rates WHERE id = $1)';
CREATE OPERATOR public.@@@@ (FUNCTION = knows, LEFTARG = int, RIGHTARG = int);
CREATE TABLE spelled_by_operator (i int CHECK (i OPERATOR(public.@@@@) 1));
INSERT INTO spelled_by_operator SELECT i FROM generate_series(1, 100) i;
"""


@pytest.mark.parametrize("bulk_bytes", [0, 100_000], ids=["all by COPY", "the big one by COPY"])
@pytest.mark.parametrize("jobs", [1, 3])
def test_values_that_look_into_other_tables_are_loaded_when_those_are_full(
    make_database: Make, local_store: LocalStore, jobs: int, bulk_bytes: int
) -> None:
    database = make_database("dependent", DEPENDENT)
    query = "SELECT sum(g), count(g), count(*) FROM public.orders"
    before = rows(database, query)
    component = dump(database, local_store, jobs=jobs, bulk_bytes=bulk_bytes, range_bytes=64 << 10)
    if bulk_bytes == 0:
        last = list(dict.fromkeys(stream.table.name for stream in component.streams if stream.table))[-3:]
        assert last == ["orders", "rated_orders", "spelled_by_operator"], "RESTORE.md loads in the manifest's order"
    restore(component, database, local_store, jobs=jobs)
    assert rows(database, query) == before


def test_where_one_that_should_come_last_cant_be_copied_pg_dump_reads_all(
    make_database: Make, local_store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    database = make_database(
        "hashed_and_checked",
        "CREATE TYPE mood AS ENUM ('a', 'b', 'c'); CREATE TABLE big AS SELECT i FROM generate_series(1, 1000) i;"
        "CREATE FUNCTION known(int) RETURNS bool LANGUAGE sql AS 'SELECT EXISTS (SELECT FROM public.big WHERE i = $1)';"
        "CREATE TABLE parted (m mood, i int CHECK (known(i))) PARTITION BY HASH (m);"
        "CREATE TABLE parted_0 PARTITION OF parted FOR VALUES WITH (MODULUS 1, REMAINDER 0);"
        "INSERT INTO parted SELECT 'a', i FROM generate_series(1, 100) i",
    )
    component = dump(database, local_store, **ALL_BY_COPY)
    assert len(component.streams) == 1
    assert "hashedandchecked is read by pg_dump alone, not by parallel COPY: a table whose checks" in caplog.text
    restore(component, database, local_store)
    assert rows(database, "SELECT count(*) FROM public.parted") == [(100,)]


def test_an_index_by_a_function_that_reads_another_table_is_made_when_that_one_is_full(
    make_database: Make, local_store: LocalStore
) -> None:
    database = make_database(
        "looking",
        "CREATE TABLE lookup (i int, v int); INSERT INTO lookup SELECT i, i % 7 FROM generate_series(1, 300) i;"
        "CREATE FUNCTION f(int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT v FROM public.lookup WHERE i = $1';"
        "CREATE TABLE big AS SELECT i, repeat('x', 300) x FROM generate_series(1, 300) i; CREATE INDEX ON big (f(i))",
    )
    component = dump(database, local_store, jobs=1, **ALL_BY_COPY)
    restore(component, database, local_store, jobs=1, soon_bytes=0)
    with session(database.url, {"enable_seqscan": "off", "search_path": "public"}) as connection:
        assert run_sql(connection, "SELECT count(*) FROM big WHERE f(i) = 3").scalar_one() == 43


def test_what_is_done_to_a_parent_waits_for_its_children(make_database: Make, local_store: LocalStore) -> None:
    database = make_database(
        "inherited",
        "CREATE TABLE parent (i int, p int, x text); CREATE TABLE child () INHERITS (parent);"
        # The bigger one, so that it is full first.
        "INSERT INTO parent SELECT i, i, repeat('x', 500) FROM generate_series(1, 20000) i;"
        "INSERT INTO child SELECT i, nullif(i, 5) FROM generate_series(1, 90000) i;"
        "ALTER TABLE parent ADD CONSTRAINT filled NOT NULL p NOT VALID; ANALYZE",
    )
    query = "SELECT (histogram_bounds::text::int[])[101] FROM pg_stats WHERE tablename = 'parent' AND inherited AND attname = 'i'"
    component = dump(database, local_store, jobs=1, **ALL_BY_COPY)
    restore(component, database, local_store, jobs=1, soon_bytes=0)
    [[bound]] = rows(database, query)
    assert int(str(bound)) > 80_000, "of the parent alone it would be 20,000"
    assert rows(database, "SELECT count(*) FROM public.child WHERE p IS NULL") == [(1,)]


def test_tables_in_a_schema_whose_name_is_a_word_of_the_list_come_back(
    make_database: Make, local_store: LocalStore
) -> None:
    database = make_database(
        "words", 'CREATE SCHEMA "DATA"; CREATE TABLE "DATA".t AS SELECT i FROM generate_series(1, 900) i'
    )
    component = dump(database, local_store, **ALL_BY_COPY)
    restore(component, database, local_store)
    assert rows(database, 'SELECT count(*) FROM "DATA".t') == [(900,)]


def test_a_type_that_is_dropped_meanwhile_fails_no_backup(make_database: Make, local_store: LocalStore) -> None:
    database = make_database("unused", "CREATE TYPE mood AS ENUM ('a'); CREATE TABLE t AS SELECT 1 AS i")
    with hold_cut([database], Operation()) as cut:
        sql(database, "DROP TYPE mood")
        cut.of(database.name).prove_names()


def test_a_table_that_cant_be_analyzed_is_restored_and_told_in_the_log(
    make_database: Make, local_store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    database = make_database(
        "unanalyzable",
        "CREATE TABLE t AS SELECT 0 AS a, i FROM generate_series(1, 1000) i; CREATE TABLE u AS SELECT 1 AS i;"
        "CREATE STATISTICS s ON (1 / a) FROM t",
    )
    component = dump(database, local_store)
    restore(component, database, local_store)
    assert rows(database, "SELECT count(*) FROM public.t") == [(1000,)]
    assert rows(database, "SELECT reltuples FROM pg_class WHERE relname = 'u'") == [(1.0,)]
    assert '"public"."t" of unanalyzable is not analyzed: PostgreSQL: division by zero' in caplog.text


def test_no_foreign_server_is_asked_by_a_restore(
    make_database: Make, local_store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    database = make_database(
        "asking",
        "CREATE EXTENSION file_fdw; CREATE SERVER gone FOREIGN DATA WRAPPER file_fdw;"
        "CREATE TABLE parted (i int) PARTITION BY RANGE (i); CREATE TABLE near PARTITION OF parted FOR VALUES FROM (0) TO (9);"
        "CREATE FOREIGN TABLE far PARTITION OF parted FOR VALUES FROM (9) TO (99) SERVER gone OPTIONS (filename '/nowhere');"
        "INSERT INTO near VALUES (1)",
    )
    component = dump(database, local_store)
    restore(component, database, local_store)
    assert rows(
        database, "SELECT relname::text, reltuples FROM pg_class WHERE relname IN ('near', 'parted') ORDER BY 1"
    ) == [
        ("near", 1.0),
        ("parted", -1.0),
    ]
    assert "is not analyzed" not in caplog.text


@WAYS
def test_rows_are_counted_in_the_table_not_in_an_index_that_lacks_some(
    make_database: Make, local_store: LocalStore, sizes: dict[str, int]
) -> None:
    database = make_database(
        "lacking",
        "CREATE TABLE t (id int PRIMARY KEY, x text); INSERT INTO t SELECT i, repeat('x', 500) FROM generate_series(1, 1000) i;"
        "UPDATE pg_index SET indisready = false WHERE indrelid = 't'::regclass",
    )
    sql(
        database,
        "INSERT INTO t SELECT i, repeat('y', 500) FROM generate_series(1001, 1100) i",
        "UPDATE pg_index SET indisready = true WHERE indrelid = 't'::regclass",
        "VACUUM ANALYZE t",
    )
    component = dump(database, local_store, **sizes)
    assert component.database
    assert [table.rows for table in component.database.tables] == [1100]
    stage(component, database, local_store)


@WAYS
def test_an_empty_vector_comes_back(make_database: Make, local_store: LocalStore, sizes: dict[str, int]) -> None:
    database = make_database(
        "vectors",
        "CREATE TABLE t AS SELECT ''::int2vector v FROM generate_series(1, 9);"
        "CREATE TABLE u AS SELECT ''::oidvector o FROM generate_series(1, 9)",
    )
    component = dump(database, local_store, **sizes)
    restore(component, database, local_store)
    assert rows(database, "SELECT DISTINCT v::text, o::text FROM public.t, public.u") == [("", "")]


def table(size_mib: int, oid: int = 1) -> BulkTable:
    return BulkTable(oid, "s", f"t{oid}", ("a",), True, 1, size_mib << 20, True)


def test_as_many_tables_are_copied_as_leave_little_to_the_dump() -> None:
    middle = [table(10, number) for number in range(100)]
    assert worth_copying(middle, 100 * 10 << 20, 16 << 20) == middle[:75]
    assert worth_copying(middle[:20], 20 * 10 << 20, 16 << 20) == []
    assert worth_copying([table(2), table(20, 2)], DUMP_BYTES, 16 << 20) == [table(20, 2)]


@pytest.mark.parametrize(
    ("query", "variables", "reason"),
    [
        ({"sslrootcert": "system"}, {}, "sslrootcert=system"),
        ({}, {"PGSSLROOTCERT": "system"}, "sslrootcert=system"),
        ({}, {"PGREQUIREAUTH": "scram-sha-256"}, "PGREQUIREAUTH"),
        ({"require_auth": "scram-sha-256"}, {}, "require_auth"),
    ],
)
def test_a_login_that_only_libpq_keeps_safe_is_left_to_pg_dump(
    postgres: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
    query: dict[str, str],
    variables: dict[str, str],
    reason: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    url: URL = postgres.url().update_query_dict(query)
    assert reason in unreachable(url)


def test_a_login_that_fails_for_now_is_tried_again_not_left_to_pg_dump(
    local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    with session(postgres.url()) as connection:
        # The two sessions that hold the cut, and no more.
        run_sql(connection, "CREATE ROLE few LOGIN CONNECTION LIMIT 2")
    try:
        with session(postgres.url()) as connection:
            run_sql(connection, "CREATE DATABASE few OWNER few")
        database = Database("few", postgres.url("few", user="few"))
        with pytest.raises(UnavailableError, match="too many connections"):
            dump(database, local_store)
    finally:
        with session(postgres.url()) as connection:
            run_sql(connection, "DROP DATABASE IF EXISTS few WITH (FORCE)")
            run_sql(connection, "DROP ROLE few")


def test_a_reading_session_notices_a_connection_that_is_cut_without_a_word(make_database: Make) -> None:
    database = make_database("kept_alive")

    async def options() -> list[int]:
        connection: asyncpg.Connection = await connect(database.url)
        sock = connection._transport.get_extra_info("socket")
        found = [
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
        ]
        await connection.close()
        return found

    assert asyncio.run(options()) == [1, 60_000]


def test_a_row_that_is_refused_is_not_shown(make_database: Make, local_store: LocalStore) -> None:
    database = make_database("private", "CREATE TABLE t AS SELECT i, 'a secret' x FROM generate_series(1, 2000) i")
    component = dump(database, local_store, **ALL_BY_COPY)
    sql(database, "TRUNCATE t", "ALTER TABLE t ADD CHECK (i < 1000)")
    streams = [stream for stream in component.streams if stream.table]
    with pytest.raises(FinalError, match="violates check constraint") as raised:
        load_ranges("private", streams, database, local_store, Operation(), Turn(1, lambda: None), are_all=True)
    assert "secret" not in str(raised.value)


def test_a_sequence_whose_name_the_source_wrote_with_doubled_backslashes(
    make_database: Make, local_store: LocalStore
) -> None:
    database = make_database("escaped", 'CREATE SEQUENCE "a\\b"; SELECT setval(\'"a\\b"\', 7)')
    with session(database.url) as connection:
        run_sql(connection, "ALTER DATABASE escaped SET standard_conforming_strings = off")
    component = dump(database, local_store)
    restore(component, database, local_store)
    assert rows(database, 'SELECT last_value FROM public."a\\b"') == [(7,)]
