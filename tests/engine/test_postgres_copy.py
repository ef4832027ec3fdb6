"""Bulk tables by COPY: every kind of table and value comes back equal, in ranges or whole, or the backup says why not."""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from relays import relayed
from round_trip import ALL_BY_COPY, RESTORE, Make, big_table, dump, restore, rows, sql, stage, stock_dump

from athena_backup.errors import AthenaError, DamagedError, PassingError
from athena_backup.manifest import Component, TableData
from athena_backup.operation import Operation
from athena_backup.pipeline import read_stream
from athena_backup.postgres.bulk import BulkTable, bulk_tables
from athena_backup.postgres.cut import hold_cut
from athena_backup.postgres.embedded import EmbeddedServer, embedded_server
from athena_backup.postgres.facts import read_facts
from athena_backup.postgres.load import Loading
from athena_backup.postgres.rename import side_name
from athena_backup.postgres.sessions import Database, parse_database_url, run_sql, session
from athena_backup.postgres.staging import discard_staging
from athena_backup.store import Entry
from athena_backup.store.local import LocalStore

VALUES = """
CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE TYPE pair AS (a int, b text);
CREATE TABLE binary_kinds (b bool, y bytea, s int2, i int4 PRIMARY KEY, l int8, f float4, d float8, n numeric, t text,
  v varchar(9), c char(5), u uuid, j json, jb jsonb, dt date, ti time, tz timetz, ts timestamp, tt timestamptz, iv interval,
  ip inet, ci cidr, m macaddr, m8 macaddr8, ia int[], ta text[][]);
INSERT INTO binary_kinds VALUES
  (true, '\\x00ff5c', -32768, 1, 9223372036854775807, '-Infinity', 'NaN', 'Infinity', E'tab\\t\\\\N\\n"ü" %', 'v', 'c',
   gen_random_uuid(), '{"a" : 1}', '{"a": [1, null]}', 'infinity', '24:00', '12:00+05:30', '-infinity', 'infinity',
   '-1 mon 2 days -03:00:00.000001', '::1/64', '10.0.0.0/8', '08:00:2b:01:02:03', '08:00:2b:01:02:03:04:05',
   '{1,NULL,3}', '[2:3][1:2]={{a,NULL},{"",b}}'),
  (NULL, '', 0, 2, 0, '-0', 1e-308, 123456789012345678901234567890.000000000000000001, '', '', '', NULL, 'null', 'null',
   '4713-01-01 BC', '00:00', NULL, '1999-12-31 23:59:59.999999', 'epoch', '0', '1.2.3.4', NULL, NULL, NULL, '{}', '{}');
CREATE TABLE text_kinds (i int, m mood, p positive, pr pair, x tsvector, pt point, r int4range, b bit varying, o oid,
  ma mood[], bl name);
INSERT INTO text_kinds VALUES (1, 'sad', 7, '(1,"x,\\"y\\"")', 'fat:1A cat', '(1,2)', '[1,5)', B'10110', 4711, '{sad,ok}', 'n'),
  (2, NULL, NULL, NULL, NULL, NULL, 'empty', B'', NULL, NULL, NULL);
"""
TABLES = """
CREATE TABLE dropped (a int, gone text, b text, c int GENERATED ALWAYS AS (a * 2) STORED, id int GENERATED ALWAYS AS IDENTITY);
INSERT INTO dropped (a, gone, b) SELECT i, 'gone', md5(i::text) FROM generate_series(1, 3000) i;
ALTER TABLE dropped DROP COLUMN gone; ALTER TABLE dropped ADD COLUMN late text DEFAULT 'late';
CREATE TABLE parent (i int, x text); CREATE TABLE child (y int) INHERITS (parent);
INSERT INTO parent SELECT i, 'p' FROM generate_series(1, 2000) i; INSERT INTO child SELECT i, 'c', i FROM generate_series(1, 2000) i;
CREATE TABLE parted (i int, x text) PARTITION BY HASH (i);
CREATE TABLE parted_0 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 1);
INSERT INTO parted SELECT i, md5(i::text) FROM generate_series(1, 5000) i;
CREATE UNLOGGED TABLE unlogged AS SELECT i FROM generate_series(1, 3000) i;
CREATE TABLE toasted (i int, x text); ALTER TABLE toasted ALTER x SET STORAGE EXTERNAL;
INSERT INTO toasted SELECT i, repeat(md5(i::text), 500) FROM generate_series(1, 40) i;
CREATE TABLE nothing (); INSERT INTO nothing DEFAULT VALUES; INSERT INTO nothing DEFAULT VALUES;
CREATE TABLE empty (i int);
CREATE TABLE holes AS SELECT i, repeat('x', 100) x FROM generate_series(1, 9000) i; DELETE FROM holes WHERE i % 3 > 0 OR i > 8000;
CREATE TABLE guarded AS SELECT i FROM generate_series(1, 3000) i; ALTER TABLE guarded ENABLE ROW LEVEL SECURITY;
CREATE TABLE many (MANY); INSERT INTO many (c1, c700) SELECT i, i FROM generate_series(1, 300) i;
CREATE VIEW looked AS SELECT * FROM dropped; CREATE MATERIALIZED VIEW kept AS SELECT count(*) FROM parted;
ALTER TABLE dropped ADD PRIMARY KEY (id); CREATE INDEX ON parted (x);
CREATE TABLE refers (id int REFERENCES dropped); INSERT INTO refers SELECT i FROM generate_series(1, 3000) i;
CREATE FUNCTION loud() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'must not fire'; END$$;
CREATE TRIGGER loud BEFORE INSERT ON refers FOR EACH ROW EXECUTE FUNCTION loud();
CREATE RULE nowhere AS ON INSERT TO guarded DO INSTEAD NOTHING;
""".replace("MANY", ", ".join(f"c{number} int" for number in range(1, 1400)))


def content(database: Database) -> dict[str, list[tuple[object, ...]]]:
    """Every table's rows as texts, sorted."""
    names = rows(
        database,
        "SELECT quote_ident(relname) FROM pg_class WHERE relkind IN ('r', 'm') AND relnamespace = 'public'::regnamespace",
    )
    return {str(name): sorted(rows(database, f"SELECT t::text FROM ONLY public.{name} t")) for (name,) in names}


def tables_by_copy(component: Component) -> dict[str, list[TableData]]:
    found: dict[str, list[TableData]] = {}
    for stream in component.streams:
        if stream.table is not None:
            found.setdefault(stream.table.name, []).append(stream.table)
    return found


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_kind_of_table_comes_back_equal(make_database: Make, local_store: LocalStore, jobs: int) -> None:
    database = make_database("kinds", TABLES)
    before = content(database)
    component = dump(database, local_store, jobs=jobs, **ALL_BY_COPY)
    copied = tables_by_copy(component)
    # A table without columns can't be named to COPY; pg_dump has it.
    assert copied.keys() == before.keys() - {"nothing", "kept"}
    assert len(copied["dropped"]) > 2
    assert len(copied["toasted"]) == 1, "its own file has one block, the rest is stored out of line"
    assert copied["dropped"][0].columns == ("a", "b", "id", "late")
    with session(database.url) as connection:
        run_sql(connection, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    restore(component, database, local_store, jobs=jobs)
    assert content(database) == before


INDEXED = """
CREATE SCHEMA "ATTACH"; CREATE TABLE "ATTACH"."a b" (i int, x text, during int4range, at timestamptz);
INSERT INTO "ATTACH"."a b" SELECT i, md5(i::text), int4range(i, i + 1), now() FROM generate_series(1, 3000) i;
CREATE INDEX "x ATTACH
y" ON "ATTACH"."a b" (x); COMMENT ON INDEX "ATTACH"."x ATTACH
y" IS 'odd'; CREATE INDEX "by expression" ON "ATTACH"."a b" (lower(x)) WHERE i > 5;
ALTER TABLE "ATTACH"."a b" ADD CONSTRAINT "the key" PRIMARY KEY (i), ADD UNIQUE (x, i), ADD EXCLUDE USING gist (during WITH &&),
  ADD CHECK (i > 0) NOT VALID, CLUSTER ON "the key";
CREATE STATISTICS "ATTACH".related ON i, x FROM "ATTACH"."a b";
CREATE UNIQUE INDEX identity ON "ATTACH"."a b" (i); ALTER TABLE "ATTACH"."a b" REPLICA IDENTITY USING INDEX "identity";
CREATE TABLE refers (i int REFERENCES "ATTACH"."a b"); INSERT INTO refers SELECT i FROM generate_series(1, 3000) i;
CREATE TABLE parted (i int, x text, PRIMARY KEY (i)) PARTITION BY HASH (i); CREATE INDEX ON parted (x);
CREATE TABLE parted_0 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 1);
INSERT INTO parted SELECT i, md5(i::text) FROM generate_series(1, 5000) i;
CREATE INDEX own ON parted_0 (length(x)); CREATE TABLE later (i int REFERENCES parted);
CREATE MATERIALIZED VIEW seen AS SELECT i, x FROM parted; CREATE UNIQUE INDEX ON seen (i);
CREATE FUNCTION twice(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 * 2';
CREATE TABLE called AS SELECT i FROM generate_series(1, 2000) i; CREATE INDEX ON called (twice(i));
"""


@pytest.mark.parametrize("jobs", [1, 3])
def test_indexes_and_constraints_come_back_equal_and_analyzed_though_made_while_others_load(
    make_database: Make, local_store: LocalStore, jobs: int
) -> None:
    database = make_database("indexed", INDEXED)
    before = stock_dump(database.url, "--schema-only")
    component = dump(database, local_store, jobs=jobs, **ALL_BY_COPY)
    restore(component, database, local_store, jobs=jobs, soon_bytes=0)
    assert stock_dump(database.url, "--schema-only") == before
    unknown = rows(
        database,
        "SELECT c.oid::regclass::text FROM pg_class c WHERE relkind IN ('r', 'm', 'p') AND reltuples < 0"
        " AND relnamespace::regnamespace::text !~ '^pg_|information_schema'",
    )
    assert unknown == []
    [[expressions]] = rows(database, "SELECT count(*) FROM pg_stats WHERE tablename = 'by expression'")
    assert expressions == 1
    assert rows(
        database, "SELECT count(*) FROM pg_stats_ext WHERE statistics_name = 'related' AND n_distinct IS NOT NULL"
    ) == [(1,)]


class LateStore(LocalStore):
    """A store that hands out nothing of one stream before something has happened."""

    def __init__(self, place: str, marker: str, happened: Callable[[], bool]) -> None:
        super().__init__(place)
        self._marker = marker
        self._happened = happened

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        if self._marker in key:
            deadline = time.monotonic() + 20
            while not self._happened():
                assert time.monotonic() < deadline
        return super().read(key, start, end)


def test_the_indexes_of_a_table_are_made_while_another_table_loads(
    make_database: Make, local_store: LocalStore
) -> None:
    database = make_database(
        "beside",
        "CREATE TABLE t AS SELECT i, md5(i::text) x FROM generate_series(1, 5000) i; CREATE INDEX t_x ON t (x);"
        "ALTER TABLE t ADD PRIMARY KEY (i); CREATE TABLE u AS SELECT i FROM generate_series(1, 100) i",
    )
    component = dump(database, local_store, **ALL_BY_COPY)
    [late] = [stream for stream in component.streams if stream.table and stream.table.name == "u"]
    staged = database.url.set(database=side_name("beside", "r", RESTORE))
    seen: list[list[object]] = []

    def made() -> bool:
        with session(staged) as connection:
            names = run_sql(connection, "SELECT indexname FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1")
            analyzed = run_sql(connection, "SELECT count(*) FROM pg_stats WHERE tablename = 't'").scalar_one()
            seen.append([*names.scalars(), analyzed])
        return seen[-1] == ["t_pkey", "t_x", 2]

    restore(component, database, LateStore(local_store.location.place, late.parts[0].key, made), soon_bytes=0)
    assert content(database)["u"]


def test_every_kind_of_value_comes_back_equal_and_only_sure_types_as_binary(
    make_database: Make, local_store: LocalStore
) -> None:
    database = make_database("values", VALUES)
    before = content(database)
    component = dump(database, local_store, **ALL_BY_COPY)
    copied = tables_by_copy(component)
    assert {name: data[0].format for name, data in copied.items()} == {"binary_kinds": "binary", "text_kinds": "text"}
    restore(component, database, local_store)
    assert content(database) == before


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "EUC_JP", "WIN1251", "UTF8"])
def test_a_database_of_any_encoding_comes_back_byte_by_byte(
    postgres: EmbeddedServer, local_store: LocalStore, encoding: str
) -> None:
    name = f"encoded_{encoding.lower()}"
    text = {"LATIN1": "é", "EUC_JP": "日本", "WIN1251": "Ж"}.get(encoding, "日本 é")
    with session(postgres.url()) as connection:
        run_sql(
            connection, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'"
        )
    database = Database("encoded", postgres.url(name))
    try:
        with session(database.url, {"client_encoding": "UTF8"}) as connection:
            run_sql(connection, f'CREATE TABLE public."{text}" (t text, "{text}" tsvector)')
            run_sql(connection, f"""INSERT INTO public."{text}" SELECT '{text}' || i FROM generate_series(1, 2000) i""")
            run_sql(connection, f'CREATE TABLE public."b{text}" AS SELECT t FROM public."{text}"')

        def seen() -> list[tuple[object, ...]]:
            with session(database.url, {"client_encoding": "UTF8"}) as connection:
                query = " UNION ALL ".join(
                    f'SELECT md5(string_agg(t, $$,$$ ORDER BY t)), count(*) FROM public."{table}"'
                    for table in (text, f"b{text}")
                )
                return [tuple(row) for row in run_sql(connection, query)]

        before = seen()
        component = dump(database, local_store, **ALL_BY_COPY)
        # What SQL_ASCII means by such a name, no other encoding can say: pg_dump has it.
        formats = {"binary", "text"} if encoding != "SQL_ASCII" else set()
        assert {data[0].format for data in tables_by_copy(component).values()} == formats
        restore(component, database, local_store)
        assert seen() == before
    finally:
        with session(postgres.url()) as connection:
            run_sql(connection, f"DROP DATABASE {name} WITH (FORCE)")


def bulk(blocks: int, size_bytes: int, *, has_ctid_scan: bool = True) -> BulkTable:
    return BulkTable(1, "s", 't"t', ("a",), True, blocks, size_bytes, has_ctid_scan)


@pytest.mark.parametrize(("blocks", "size_bytes"), [(0, 0), (1, 10), (7, 70), (1000, 8_000_000), (3, 1 << 40)])
def test_the_ranges_of_a_table_have_every_block_once_and_those_that_come_later(blocks: int, size_bytes: int) -> None:
    ranges = bulk(blocks, size_bytes).ranges(1000)
    assert 1 <= len(ranges) <= max(1, min(blocks, 1000))
    bounds = [re.findall(r"ctid (>=|<) '\((\d+),0\)'", one.condition or "") for one in ranges]
    assert [[sign for sign, _ in some] for some in bounds] == [
        [">="] * (number > 0) + ["<"] * (number < len(ranges) - 1) for number in range(len(ranges))
    ]
    assert [some[-1][1] for some in bounds[:-1]] == [some[0][1] for some in bounds[1:]]
    assert all(int(some[0][1]) < int(some[1][1]) for some in bounds[1:-1])
    assert len(bulk(blocks, size_bytes, has_ctid_scan=False).ranges(1000)) == 1
    assert [one.query is None for one in ranges] == [len(ranges) == 1] * len(ranges)


@pytest.mark.parametrize(
    ("rows", "jobs", "is_near", "is_split"),
    [
        (60_000, 1, True, False),
        (60_000, 2, True, True),
        (18_000, 2, True, False),
        (18_000, 2, False, True),
        (18_000, 4, True, True),
        (6_000, 2, False, False),
    ],
    ids=["one job", "much more than its share", "half more", "half more, far away", "more jobs", "no more, far away"],
)
def test_only_a_table_that_others_would_wait_for_is_read_in_ranges(
    make_database: Make,
    local_store: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    jobs: int,
    is_near: bool,
    is_split: bool,
) -> None:
    """The big one is some 0.9 or 0.7 of the whole, or less than half."""
    made = "CREATE TABLE {} AS SELECT i, repeat(md5(i::text), 4) x FROM generate_series(1, {}) i"
    database = make_database("shares", f"{made.format('big', rows)}; {made.format('other', 7_000)}")
    monkeypatch.setattr("athena_backup.postgres.bulk.RANGE_BYTES", 1 << 20)
    with contextlib.ExitStack() as stack:
        if not is_near:
            port = stack.enter_context(relayed(database.url.port or 0))
            database = Database(database.name, database.url.set(port=port))
        component = dump(database, local_store, jobs=jobs, bulk_bytes=1 << 20)
    copied = tables_by_copy(component)
    assert (len(copied["big"]) > 1) == is_split
    assert sum(data.rows for data in copied["big"]) == rows


def test_at_a_limited_rate_no_table_is_read_in_ranges_which_would_have_to_be_counted(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = big_table(make_database, "limited")
    monkeypatch.setattr("athena_backup.postgres.bulk.RANGE_BYTES", 1 << 20)
    for operation, is_split in ((Operation(), True), (Operation.lasting(60, bytes_per_second=1e9), False)):
        component = dump(database, local_store, operation=operation, bulk_bytes=1 << 20)
        assert (len(component.streams) > 2) == is_split


def test_a_table_in_one_piece_is_stored_in_parts_of_its_own_size(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the set goes on behind the last part that it has."""
    monkeypatch.setattr("athena_backup.postgres.dump._TABLE_PART_BYTES", 1 << 20)
    database = big_table(make_database, "parts")
    before = content(database)
    component = dump(database, local_store, jobs=1, bulk_bytes=1 << 20)
    assert [len(stream.parts) > 1 for stream in component.streams] == [False, True]
    sql(database, "DELETE FROM t")
    restore(component, database, local_store)
    assert content(database) == before


@pytest.mark.parametrize("light_bytes", [1 << 20, -1], ids=["without a slot", "in the first slot"])
def test_what_no_dump_holds_is_read_at_once_and_the_dump_begins_before_any_table(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch, light_bytes: int
) -> None:
    """What they look at DDL may queue for in the hours after; the only slot is taken until the first of it has been read."""
    has_facts = threading.Event()
    written: list[str] = []
    real = read_facts

    def noted(*args: Any, **options: Any) -> Any:
        try:
            return real(*args, **options)
        finally:
            has_facts.set()

    class NotingStore(LocalStore):
        def write(self, key: str, chunks: Iterable[bytes]) -> Entry:
            assert has_facts.wait(30)
            written.append(key.rpartition("/")[2])
            return super().write(key, chunks)

    monkeypatch.setattr("athena_backup.postgres.dump.read_facts", noted)
    # So that the table is bigger than what the two have to read.
    monkeypatch.setattr("athena_backup.postgres.dump._CATALOGS_BYTES", 1)
    monkeypatch.setattr("athena_backup.postgres.dump._LIGHT_BYTES", light_bytes)
    dump(big_table(make_database, "first"), NotingStore(local_store.location.place), jobs=1, bulk_bytes=1 << 20)
    assert [name.split(".")[0] == "dump" for name in written] == [True, False]


def test_a_stream_with_other_rows_than_the_manifest_promises_is_not_taken(
    make_database: Make, local_store: LocalStore
) -> None:
    database = big_table(make_database, "promised")
    component = dump(database, local_store, bulk_bytes=0)
    *others, last = component.streams
    assert last.table is not None
    wrong = last.model_copy(update={"table": last.table.model_copy(update={"rows": last.table.rows + 1})})
    with pytest.raises(DamagedError, match=r"got 200000 rows from .*, the manifest promises 200001"):
        stage(component.model_copy(update={"streams": (*others, wrong)}), database, local_store)
    discard_staging(database, RESTORE)
    without = component.model_copy(update={"streams": tuple(others)})
    with pytest.raises(DamagedError, match=r"public\.t has 0 rows instead of 200000"):
        stage(without, database, local_store)
    discard_staging(database, RESTORE)


def test_a_table_whose_owner_may_not_write_to_it_is_restored_by_him(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    with session(postgres.url()) as admin:
        run_sql(admin, "CREATE ROLE reader_only LOGIN CREATEDB")
    try:
        database = make_database(
            "own", "CREATE TABLE t AS SELECT 1 AS i; REVOKE INSERT, TRUNCATE ON t FROM reader_only", owner="reader_only"
        )
        component = dump(database, local_store, bulk_bytes=0)
        assert tables_by_copy(component).keys() == {"t"}
        restore(component, database, local_store)
        assert rows(database, "SELECT i FROM public.t") == [(1,)]
        with pytest.raises(AthenaError, match="permission denied for table t"):
            sql(database, "INSERT INTO t VALUES (2)")
        sql(database, "DROP TABLE t")
    finally:
        with session(postgres.url()) as admin:
            run_sql(admin, "ALTER DATABASE own OWNER TO postgres")
            run_sql(admin, "DROP ROLE reader_only")


def test_a_parameter_that_only_libpq_knows_leaves_everything_to_pg_dump(
    make_database: Make, local_store: LocalStore
) -> None:
    database = big_table(make_database, "libpq")
    url = parse_database_url("libpq", f"{database.url.render_as_string(hide_password=False)}?gssencmode=disable")
    component = dump(Database("libpq", url), local_store, bulk_bytes=0)
    assert len(component.streams) == 1
    with hold_cut([database], Operation()) as cut:
        assert [table.name for table in bulk_tables(cut.of("libpq"), {}, bulk_bytes=0)] == ["t"]


def test_a_login_that_only_libpq_can_do_leaves_everything_to_pg_dump_and_is_logged(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("gssapi module not found")

    database = big_table(make_database, "kerberos")
    monkeypatch.setattr("athena_backup.postgres.copy_login.asyncpg.connect", refuse)
    component = dump(database, local_store, bulk_bytes=0)
    assert len(component.streams) == 1
    assert "kerberos is read by pg_dump alone, not by parallel COPY" in caplog.text
    assert "gssapi module not found" in caplog.text


def test_each_stream_is_copys_own_bytes(make_database: Make, local_store: LocalStore) -> None:
    database = make_database("plain", "CREATE TABLE t AS SELECT 7 AS i; CREATE TABLE u AS SELECT 'a'::tsvector AS x")
    component = dump(database, local_store, bulk_bytes=0)
    streams = {
        stream.name.rpartition(".")[0].rpartition(".")[2]: stream for stream in component.streams if stream.table
    }
    raw = {
        kind: b"".join(read_stream("plain", stream.parts, local_store, Operation())) for kind, stream in streams.items()
    }
    assert raw["txt"] == b"'a'\n"
    assert raw["bin"].startswith(b"PGCOPY\n\xff\r\n\0")
    assert raw["bin"].endswith(b"\0\x01\0\0\0\x04\0\0\0\x07\xff\xff")


def test_ten_thousand_tables_are_read_by_a_server_as_it_comes(tmp_path: Path, local_store: LocalStore) -> None:
    # The lock table's size is what this is about: the other tests' server has room for more connections, and so for more locks.
    with embedded_server(tmp_path / "data") as server:
        database = Database("many", server.url())
        for start in range(0, 10_000, 2_000):
            sql(
                database,
                f"DO $$BEGIN FOR i IN {start}..{start + 1_999} LOOP"
                " EXECUTE format('CREATE TABLE t%s (i int)', i); END LOOP; END$$",
            )
        component = dump(database, local_store)
        assert component.database is not None
        assert len(component.database.tables) == 10_000


def test_indexes_that_wait_for_each_others_locks_are_made_again(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadlock is made up: whether two of a table meet in it is chance, as they may do here besides."""
    database = make_database(
        "clustered",
        "CREATE TABLE t AS SELECT i FROM generate_series(1, 1000) i; ALTER TABLE t ALTER i SET NOT NULL;"
        "CREATE INDEX a ON t (i); ALTER TABLE t CLUSTER ON a;"
        "CREATE UNIQUE INDEX b ON t (i); ALTER TABLE t REPLICA IDENTITY USING INDEX b",
    )
    before = stock_dump(database.url, "--schema-only")
    component = dump(database, local_store, **ALL_BY_COPY)
    real, failures = Loading.restore, [PassingError("deadlock detected")]

    def restoring(loading: Loading, archive: str | None = None, **named: Any) -> None:
        if failures and any(b" INDEX " in entry for entry in named["entries"]):
            raise failures.pop()
        real(loading, archive, **named)

    monkeypatch.setattr(Loading, "restore", restoring)
    restore(component, database, local_store, jobs=2, soon_bytes=0)
    assert failures == []
    assert stock_dump(database.url, "--schema-only") == before


def test_rows_that_one_session_loads_are_written_as_frozen(make_database: Make, local_store: LocalStore) -> None:
    """Else whoever reads them first, or the next vacuum, would write them all a second time."""
    database = make_database("frozen", "CREATE TABLE t AS SELECT i FROM generate_series(1, 1000) i")
    restore(dump(database, local_store, **ALL_BY_COPY), database, local_store, jobs=1)
    # By the map of visible pages, as ANALYZE counts it.
    [(visible, pages)] = rows(database, "SELECT relallvisible, relpages FROM pg_class WHERE relname = 't'")
    assert 0 < pages == visible
