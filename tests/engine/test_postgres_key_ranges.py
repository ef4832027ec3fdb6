"""Tables whose blocks can't be read by themselves are read by ranges of a column, and everybody's connections have one budget.

The access method is heap by another name: of such a one nobody knows whether a range of blocks is cheap, or what a block is.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

import asyncpg
import pytest
from round_trip import ALL_BY_COPY, SET, Make, dump, restore, rows, sql

from athena_backup.crew import Crew, Turn
from athena_backup.errors import PassingError
from athena_backup.manifest import Component
from athena_backup.operation import Operation
from athena_backup.postgres.bulk import TableRange, bulk_tables
from athena_backup.postgres.bulk_keys import Key
from athena_backup.postgres.copy_out import CopySessions, _CopySession
from athena_backup.postgres.copy_pieces import Gathered
from athena_backup.postgres.copy_places import CopyPlaces
from athena_backup.postgres.cut import Cut, hold_cut
from athena_backup.postgres.dump import write_database
from athena_backup.postgres.embedded import binaries
from athena_backup.postgres.sessions import Database
from athena_backup.store.local import LocalStore

APART = "CREATE ACCESS METHOD apart TYPE TABLE HANDLER heap_tableam_handler"


def streams_of(component: Component, table: str) -> list[int]:
    return [one.table.rows for one in component.streams if one.table is not None and one.table.name == table]


KEYS = {
    "int2": "(i / 4)::int2",
    "int4": "i - 9000",
    "int8": "i * 10000000000",
    "numeric": "i / 7.0",
    "uuid": "lpad(to_hex(i), 32, '0')::uuid",
    "date": "date '2000-01-01' + i",
    "timestamp": "timestamp '1999-12-31' + i * interval '1 hour'",
    "timestamptz": "timestamptz '1999-12-31 00:00+05:30' + i * interval '1 hour'",
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_table_without_ctid_scans_is_read_by_ranges_of_a_column_found_by_its_index(
    make_database: Make, local_store: LocalStore, kind: str
) -> None:
    """Rows that came after the statistics lie below the lowest bound, above the highest, and are NULL."""
    database = make_database(
        "apart",
        f'{APART}; CREATE TABLE t ("kéy" {kind}, x text) USING apart; SET TimeZone = \'Asia/Kolkata\'; CREATE INDEX ON t ("kéy");'
        f"INSERT INTO t SELECT {KEYS[kind]}, md5(i::text) FROM generate_series(1, 20000) i WHERE i % 2 = 0 OR i BETWEEN 6000 AND 15000;"
        f"DELETE FROM t WHERE ctid < '(9,0)'; INSERT INTO t SELECT NULL, 'none' FROM generate_series(1, 300); ANALYZE t;"
        f"INSERT INTO t SELECT {KEYS[kind]}, 'outside' FROM (VALUES (-9), (0), (20001)) v (i); INSERT INTO t VALUES (NULL, 'late')",
    )
    before = sorted(rows(database, "SELECT t::text FROM public.t"))
    component = dump(database, local_store, **ALL_BY_COPY)
    found = streams_of(component, "t")
    assert len(found) > 4
    assert found[-1] == 301, "NULLs are a range of their own"
    assert all(0 < some < len(before) / 3 for some in found)
    assert sum(found) == len(before)
    # That of CREATE INDEX, the look above and the count; a range that was read so would have read the whole table.
    scans = f"SELECT seq_scan, idx_scan >= {len(found)} FROM pg_stat_user_tables WHERE relname = 't'"
    awaited(database, scans, (3, True))
    sql(database, "DROP TABLE t")
    restore(component, database, local_store)
    assert sorted(rows(database, "SELECT t::text FROM public.t")) == before


def awaited(database: Database, query: str, wanted: tuple[object, ...]) -> None:
    """The server says what it has counted when a session ends, not at once."""
    deadline = time.monotonic() + 20
    while (found := rows(database, query)) != [wanted]:
        assert time.monotonic() < deadline, found
        threading.Event().wait(0.02)


NOT_SPLIT = {
    "no statistics": "CREATE TABLE t (i int PRIMARY KEY, x text) USING apart; INSERT {}",
    "no index": "CREATE TABLE t (i int, x text) USING apart; INSERT {}; ANALYZE t",
    "another order": "CREATE TABLE t (i int PRIMARY KEY, x text) USING apart; INSERT {} ORDER BY 2; ANALYZE t",
    "mostly NULL": "CREATE TABLE t (i int, x text) USING apart; INSERT INTO t SELECT CASE WHEN i % 4 = 0 THEN i END,"
    " md5(i::text) FROM generate_series(1, 20000) i; CREATE INDEX ON t (i); ANALYZE t",
    "part of it": "CREATE TABLE t (i int, x text) USING apart; INSERT {}; CREATE INDEX ON t (i) WHERE i > 10; ANALYZE t",
    "an expression": "CREATE TABLE t (i int, x text) USING apart; INSERT {}; CREATE INDEX ON t ((i + 1)); ANALYZE t",
    "by hash": "CREATE TABLE t (i int, x text) USING apart; INSERT {}; CREATE INDEX ON t USING hash (i); ANALYZE t",
    "by a collation": "CREATE TABLE t (i int, x text PRIMARY KEY) USING apart; INSERT {} ORDER BY 2; ANALYZE t",
    "its own order": "CREATE OPERATOR CLASS backwards FOR TYPE int USING btree AS OPERATOR 1 >, OPERATOR 2 >=, OPERATOR 3 =,"
    " OPERATOR 4 <=, OPERATOR 5 <, FUNCTION 1 turned(int, int); CREATE TABLE t (i int, x text) USING apart; INSERT {};"
    " CREATE INDEX ON t (i backwards); ANALYZE t",
}


@pytest.mark.parametrize("why", NOT_SPLIT)
def test_where_no_index_finds_a_range_without_the_rest_the_table_is_read_in_one_piece(
    make_database: Make, local_store: LocalStore, why: str
) -> None:
    turned = "CREATE FUNCTION turned(int, int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT sign($2 - $1)::int'"
    insert = "INTO t SELECT i, md5(i::text) FROM generate_series(1, 20000) i"
    database = make_database("whole", f"{APART}; {turned}; {NOT_SPLIT[why].format(insert)}")
    assert streams_of(dump(database, local_store, **ALL_BY_COPY), "t") == [20_000]


def test_repeated_bounds_make_no_range_twice_and_one_range_is_the_table() -> None:
    key = Key("i", ["1", "5", "5", "5", "9"])
    for count in (2, 100):
        assert key.ranges(count) == ["\"i\" < '5'", "\"i\" >= '5'", '"i" IS NULL']
    assert Key("i", ["1", "2"]).ranges(7) == [None]
    assert Key("i", ["1", "2", "3"]).ranges(1) == [None]


def back_up(database: Database, cut: Cut, store: LocalStore) -> Component:
    return write_database(
        *(database, cut, store, SET, "run", Operation()),
        crew=Crew(2),
        client_directories=[binaries()],
        **ALL_BY_COPY,
    )


TWO_TABLES = "; ".join(
    f"CREATE TABLE {table} (i int PRIMARY KEY, x text) USING apart;"
    f"INSERT INTO {table} SELECT i, md5(i::text) FROM generate_series(1, 20000) i; ANALYZE {table}"
    for table in ("t", "u")
)


def test_defective_indexes_are_named_and_the_next_try_reads_the_tables_without_them(
    make_database: Make, local_store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows came while the indexes took none, as after a change of collations or a lost write."""
    database = make_database("defective", f"{APART}; {TWO_TABLES}")
    ready = "UPDATE pg_index SET indisready = {} WHERE indexrelid IN ('t_pkey'::regclass, 'u_pkey'::regclass)"
    for statement in (ready.format("false"), "INSERT INTO t VALUES (20001)", "INSERT INTO u VALUES (-1)"):
        sql(database, statement)
    sql(database, ready.format("true"))
    with hold_cut([database], Operation()) as cut:
        with pytest.raises(
            PassingError, match=r"have 20000 rows, the table has 20001: an index by i is defective"
        ) as seen:
            back_up(database, cut, local_store)
        assert seen.value.next_step in {f'REINDEX TABLE "public"."{table}"' for table in ("t", "u")}
        for table in ("t", "u"):
            assert f'(REINDEX TABLE "public"."{table}"); the next try reads the table without it' in caplog.text
        component = back_up(database, cut, local_store)
    assert streams_of(component, "t") == streams_of(component, "u") == [20_001]


def test_an_index_that_cant_be_read_keeps_no_table_from_the_backup(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is made up: to damage a file under a running server would be chance."""
    database = make_database("corrupt", f"{APART}; {TWO_TABLES}")
    real = _CopySession._copied

    async def copied(reading: _CopySession, of: TableRange, gathered: Gathered) -> str:
        if of.by_key and of.table.name == "t":
            raise asyncpg.exceptions.IndexCorruptedError('index "t_pkey" contains unexpected zero page at block 3')
        return await real(reading, of, gathered)

    monkeypatch.setattr(_CopySession, "_copied", copied)
    with hold_cut([database], Operation()) as cut:
        with pytest.raises(PassingError, match=r'reading "public"."t": an index may be defective: .*zero page') as seen:
            back_up(database, cut, local_store)
        assert seen.value.next_step == 'REINDEX TABLE "public"."t"'
        component = back_up(database, cut, local_store)
    assert streams_of(component, "t") == [20_000]
    assert len(streams_of(component, "u")) > 2


def test_sessions_that_wait_for_work_give_their_places_to_other_databases(
    make_database: Make, local_store: LocalStore
) -> None:
    one, other = (make_database(name, "CREATE TABLE t AS SELECT 1 AS i") for name in ("first", "second"))
    places = CopyPlaces(2)

    @contextlib.contextmanager
    def two_used(sessions: CopySessions) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(sessions.one(Operation(), Turn(1, lambda: None)))._enter(table)
            yield

    def backends(database: Database) -> str:
        return (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'athena-backup' AND query LIKE 'LOCK TABLE %NOWAIT'"
            f" AND datname = '{database.database}'"
        )

    with hold_cut([one, other], Operation()) as cut:
        table = bulk_tables(cut.of(one.name), {}, bulk_bytes=0)[0]
        firsts, seconds = (CopySessions(cut.of(name), [], places) for name in (one.name, other.name))
        with two_used(firsts):
            pass
        awaited(one, backends(one), (2,))
        write_database(
            *(cut.held[other.name].database, cut, local_store, SET, "run", Operation()),
            crew=Crew(2),
            places=places,
            client_directories=[binaries()],
        )
        awaited(one, backends(one), (1,))  # pg_dump had the other place
        with two_used(firsts):
            awaited(one, backends(one), (2,))
        table = bulk_tables(cut.of(other.name), {}, bulk_bytes=0)[0]
        with places.one():
            awaited(one, backends(one), (1,))
            with seconds.one(Operation(), Turn(1, lambda: None)) as reading:
                reading._enter(table)
                awaited(one, backends(one), (1,))  # which keeps the locks of what is still to be read
        awaited(other, backends(other), (1,))
        firsts.close()
        seconds.close()
        awaited(other, backends(other), (0,))


class Ending:
    """A session that only knows whether it was closed."""

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def test_places_end_the_oldest_session_that_is_not_the_last_of_its_database_and_what_is_no_use() -> None:
    places, sessions = CopyPlaces(3), [Ending() for _ in range(5)]

    def closed() -> list[int]:
        return [number for number, session in enumerate(sessions) if session.is_closed]

    for _ in range(3):
        assert places.take("a") is None
    for number in range(3):
        places.give_back("a", sessions[number], is_whole=True)
    assert places.take("b") is None
    assert closed() == [0]
    assert places.take("b") is None
    assert closed() == [0, 1]
    assert places.take("b") is None
    assert closed() == [0, 1], "the last one of a"
    places.give_back("b", sessions[3], is_whole=False)
    assert closed() == [0, 1, 3], "a broken one"
    places.close("b")
    places.give_back("b", sessions[4], is_whole=True)
    assert closed() == [0, 1, 3, 4], "nobody needs it any more"
    places.give_back("b", None, is_whole=False)  # it could not be opened
    with pytest.raises(ZeroDivisionError), places.one():
        raise ZeroDivisionError
    assert places._in_use == 0
    assert places.take("a") is sessions[2]
