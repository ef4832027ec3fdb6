"""What comes between a table and its copy: DDL, a cancel, a cut connection, rows that nobody read. It waits, or is told by name."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest
from round_trip import SET, Make, big_table, dump, restore, rows, sql
from sqlalchemy import text

from athena_backup.crew import Crew, Turn
from athena_backup.errors import AthenaError, FinalError, PassingError
from athena_backup.manifest import Component
from athena_backup.operation import Operation
from athena_backup.postgres import copy_out
from athena_backup.postgres.bulk import BulkTable, TableRange, bulk_tables
from athena_backup.postgres.copy_in import rows_of
from athena_backup.postgres.copy_out import CopySessions, count_rows
from athena_backup.postgres.cut import hold_cut
from athena_backup.postgres.dump import write_database
from athena_backup.postgres.embedded import EmbeddedServer, binaries
from athena_backup.postgres.sessions import Database, run_sql, session
from athena_backup.store.local import LocalStore


class MeddledStore(LocalStore):
    """A store in which something happens when the first bytes of a table have come."""

    def __init__(self, place: str, meddle: Callable[[], None]) -> None:
        super().__init__(place)
        self._meddle: Callable[[], None] | None = meddle
        self._lock = threading.Lock()

    def write(self, key: str, chunks):  # type: ignore[no-untyped-def]
        def meddled() -> Iterator[bytes]:
            for chunk in chunks:
                yield chunk
                with self._lock:
                    meddle, self._meddle = (self._meddle, None) if "/tables/" in key else (None, self._meddle)
                if meddle is not None:
                    meddle()

        return super().write(key, meddled())


def back_up(
    database: Database, store: LocalStore, operation: Operation | None = None, jobs: int = 2, range_bytes: int = 1 << 20
) -> Component:
    operation = operation or Operation()
    with hold_cut([database], operation) as cut:
        return write_database(
            *(database, cut, store, SET, "run", operation),
            crew=Crew(jobs),
            client_directories=[binaries()],
            bulk_bytes=0,
            range_bytes=range_bytes,
        )


def test_a_copy_whose_connection_is_ended_may_be_tried_again(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    wide = "CREATE TABLE t AS SELECT i, repeat(md5(i::text), 8) x FROM generate_series(1, 200000) i"
    database = make_database("ended", wide)

    def end() -> None:
        with session(postgres.url()) as admin:
            run_sql(
                admin,
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE query LIKE 'COPY%' AND datname = 'ended'",
            )

    with pytest.raises(PassingError, match=r'reading "public"\."t": PostgreSQL: '):
        back_up(database, MeddledStore(local_store.location.place, end), jobs=1, range_bytes=1 << 30)
    assert len(back_up(database, local_store).streams) > 3


def queued_behind(database: Database, postgres: EmbeddedServer, statement: str) -> threading.Thread:
    """DDL that waits for the locks of a backup that goes on."""
    queued = threading.Thread(target=lambda: sql(database, statement))
    queued.start()
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE query = :query AND wait_event_type = 'Lock'"
    with session(postgres.url()) as admin:
        while not admin.execute(text(waiting), {"query": statement}).scalar_one():
            pass
    return queued


def test_ddl_that_queues_for_a_table_that_is_still_to_be_read_fails_the_component_which_names_it(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more tables than a session locks at its start."""
    monkeypatch.setattr("athena_backup.postgres.copy_out._LOCKED_LIMIT", 2)
    make = "CREATE TABLE {} AS SELECT i, md5(i::text) x FROM generate_series(1, {}) i"
    database = make_database("queued", f"{make.format('t', 200_000)}; {make.format('u', 100_000)}")
    queued: list[threading.Thread] = []

    def queue() -> None:
        queued.append(queued_behind(database, postgres, "TRUNCATE u /* in the middle */"))

    with pytest.raises(FinalError, match=r"table lock was refused: pid \d+ waits with .*in the middle") as seen:
        back_up(database, MeddledStore(local_store.location.place, queue), jobs=1, range_bytes=1 << 30)
    assert seen.value.step == "locking the tables"
    queued[0].join(20)
    assert not queued[0].is_alive()


def test_ddl_that_queues_for_one_of_the_biggest_tables_waits_until_it_is_read(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    make = "CREATE TABLE {} AS SELECT i, md5(i::text) x FROM generate_series(1, {}) i"
    database = make_database("second", f"{make.format('t', 200_000)}; {make.format('u', 100_000)}")
    queued: list[threading.Thread] = []

    def queue() -> None:
        queued.append(queued_behind(database, postgres, "TRUNCATE u /* the second */"))

    component = back_up(database, MeddledStore(local_store.location.place, queue), jobs=1, range_bytes=1 << 30)
    queued[0].join(20)
    assert not queued[0].is_alive()
    assert rows_of(component.streams)["public", "u"] == 100_000


@pytest.mark.parametrize("limit", [64, 2], ids=["at the session's start", "when it has a lock already"])
def test_a_server_without_room_for_more_locks_is_asked_for_the_one_that_is_needed(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """The error is made up: whose statement first finds the server's table of locks full is chance."""
    refused: list[int] = []
    real = copy_out._CopySession._lock

    def full(session: copy_out._CopySession, tables: Sequence[BulkTable]) -> None:
        if len(session._locked) + len(tables) > 1:
            refused.append(len(tables))
            raise asyncpg.OutOfMemoryError("out of shared memory")
        real(session, tables)

    monkeypatch.setattr(copy_out, "_LOCKED_LIMIT", limit)
    monkeypatch.setattr(copy_out._CopySession, "_lock", full)
    names = ("t", "u", "v")
    make = "CREATE TABLE {} AS SELECT i FROM generate_series(1, 1000) i"
    database = make_database("locks", "; ".join(make.format(name) for name in names))
    component = back_up(database, local_store, jobs=1)
    assert rows_of(component.streams) == {("public", name): 1_000 for name in names}
    assert refused == [3 if limit > 2 else 1], "once: then it asks for no more than it may have"


def test_ddl_that_queues_between_the_ranges_of_a_table_waits_until_it_is_read(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    database = big_table(make_database, "between")
    queued: list[threading.Thread] = []

    def queue() -> None:
        queued.append(queued_behind(database, postgres, "TRUNCATE t /* between */"))

    component = back_up(database, MeddledStore(local_store.location.place, queue), jobs=1)
    queued[0].join(20)
    assert not queued[0].is_alive()
    assert sum(stream.table.rows for stream in component.streams if stream.table) > 0
    assert rows_of(component.streams)["public", "t"] == component.database.tables[0].rows


def test_a_session_that_comes_late_needs_only_the_lock_of_the_table_that_it_reads(
    make_database: Make, local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    make = "CREATE TABLE {} AS SELECT i, md5(i::text) x FROM generate_series(1, 100000) i"
    database = make_database("late", f"{make.format('t')}; {make.format('u')}")
    with hold_cut([database], Operation()) as cut:
        held = cut.of(database.name)
        tables = {table.name: table for table in bulk_tables(held, {}, bulk_bytes=0)}
        queued = queued_behind(database, postgres, "TRUNCATE u /* late */")
        with contextlib.closing(CopySessions(held, list(tables.values()))) as sessions:
            assert count_rows(sessions, tables["t"], Operation(), Turn(1, lambda: None)) == 100_000
    queued.join(20)
    assert not queued.is_alive()


def test_a_cancel_ends_the_copies_in_the_server_too(make_database: Make, local_store: LocalStore) -> None:
    database = big_table(make_database, "cancelled")
    operation = Operation()
    store = MeddledStore(local_store.location.place, lambda: operation.cancel("a person said so"))
    with pytest.raises(AthenaError, match="a person said so"):
        back_up(database, store, operation)
    busy = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = 'cancelled' AND query LIKE 'COPY%' AND state = 'active'"
    )
    with session(database.url) as connection:
        while run_sql(connection, busy).scalar_one():
            pass


def test_rows_that_the_ranges_miss_fail_the_backup(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = big_table(make_database, "missed")
    whole = BulkTable.ranges

    def short(table: BulkTable, range_bytes: int) -> Sequence[TableRange]:
        found = whole(table, range_bytes)
        return [*found[:-1], replace(found[-1], condition=f"{found[-1].condition} AND i < 200000")]

    monkeypatch.setattr(BulkTable, "ranges", short)
    with pytest.raises(FinalError, match=r'the ranges of "public"\."t" have \d+ rows, the table has 200000'):
        back_up(database, local_store)


def test_rows_that_pg_dump_leaves_out_or_writes_twice_fail_the_backup(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    database = make_database("left_out", "CREATE TABLE t AS SELECT 1 AS i; CREATE TABLE u AS SELECT 2 AS i")
    (tmp_path / "pg_restore").symlink_to(binaries() / "pg_restore")
    saying = tmp_path / "pg_dump"

    def by(line: str, **sizes: int) -> None:
        saying.write_text(f"#!/bin/bash\n{line}\n")
        saying.chmod(0o755)
        with hold_cut([database], Operation()) as cut:
            write_database(
                *(database, cut, local_store, SET, "run", Operation()), client_directories=[tmp_path], **sizes
            )

    program = binaries() / "pg_dump"
    with pytest.raises(FinalError, match="pg_dump left out the rows of tables: OIDs"):
        by(f'[ "$1" = --version ] && exec {program} "$@"; exec {program} --exclude-table-data=public.u "$@"')
    with pytest.raises(FinalError, match="pg_dump wrote the rows of tables that were left to COPY: OIDs"):
        by(f'exec {program} "${{@/--exclude-table-data=*/--no-password}}"', bulk_bytes=0)


@pytest.mark.parametrize("bulk_bytes", [0, 1 << 50], ids=["by COPY", "by pg_dump"])
def test_a_table_that_is_made_after_the_cut_is_no_part_of_the_backup_and_no_fault_of_it(
    make_database: Make, local_store: LocalStore, bulk_bytes: int
) -> None:
    database = make_database("late", "CREATE TABLE t AS SELECT 1 AS i")
    with hold_cut([database], Operation()) as cut:
        sql(database, "CREATE TABLE late AS SELECT 2 AS i")
        component = write_database(
            *(database, cut, local_store, SET, "run", Operation()),
            crew=Crew(2),
            client_directories=[binaries()],
            bulk_bytes=bulk_bytes,
        )
    assert component.database is not None
    assert [(table.name, table.rows) for table in component.database.tables] == [("t", 1)]
    restore(component, database, local_store)
    assert rows(database, "SELECT to_regclass('public.late')::text, (SELECT i FROM public.t)") == [(None, 1)]


def test_a_count_that_nobody_waits_for_any_more_ends_in_the_server(make_database: Make) -> None:
    """The table is a view that sleeps: no table takes long enough to count."""
    database = make_database("counted", "CREATE VIEW slow AS SELECT 1 AS i WHERE pg_sleep(600) IS NULL")
    operation = Operation()
    busy = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = 'counted' AND state = 'active' AND pid <> pg_backend_pid()"
        " AND query LIKE 'SELECT count(*) FROM ONLY%slow%'"
    )
    with hold_cut([database], operation) as cut, contextlib.closing(CopySessions(cut.of("counted"), [])) as sessions:
        slow = BulkTable(1, "public", "slow", ("i",), True, 1, 1, True)
        errors: list[AthenaError] = []

        def count() -> None:
            try:
                count_rows(sessions, slow, operation, Turn(1, operation.check))
            except AthenaError as error:
                errors.append(error)

        counting = threading.Thread(target=count)
        counting.start()
        with session(database.url) as connection:
            while not run_sql(connection, busy).scalar_one():
                assert counting.is_alive()
            operation.cancel("a person said so")
            counting.join(20)
            assert [error.cause for error in errors] == ["a person said so"]
            deadline = time.monotonic() + 20
            while run_sql(connection, busy).scalar_one():
                assert time.monotonic() < deadline


def test_a_login_that_fails_for_a_moment_is_tried_again(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = asyncpg.connect, [TimeoutError(), ConnectionRefusedError()]

    async def connecting(*arguments: object, **named: object) -> object:
        if failures:
            raise failures.pop()
        return await real(*arguments, **named)

    database = big_table(make_database, "busy")
    monkeypatch.setattr("athena_backup.postgres.copy_login.asyncpg.connect", connecting)
    assert len(dump(database, local_store, bulk_bytes=0).streams) > 1


def test_a_table_that_somebody_has_made_and_locked_since_keeps_nobody(
    make_database: Make, local_store: LocalStore
) -> None:
    database = make_database("made", "CREATE TABLE t AS SELECT 1 AS i")
    with hold_cut([database], Operation()) as cut:
        sql(database, "CREATE TABLE late AS SELECT 2 AS i")
        with session(database.url, {"search_path": "public"}) as busy:
            run_sql(busy, "BEGIN; LOCK TABLE late IN ACCESS EXCLUSIVE MODE")
            component = write_database(
                *(database, cut, local_store, SET, "run", Operation.lasting(20)),
                crew=Crew(2),
                client_directories=[binaries()],
                bulk_bytes=0,
            )
    assert rows_of(component.streams) == {("public", "t"): 1}
