"""How many of the server's processes help with an index: its share of the cores, or what the server is set to."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
from relays import relayed
from round_trip import ALL_BY_COPY, Make, dump, restore, rows

from athena_backup.postgres import load
from athena_backup.postgres.load_plan import IndexWorkers, Plan
from athena_backup.postgres.sessions import Database, run_sql, session
from athena_backup.store.local import LocalStore


def execute(database: Database, statement: str) -> None:
    """One statement in a session of its own."""
    with session(database.url) as connection:
        run_sql(connection, statement)


@contextlib.contextmanager
def greedy_role(database: Database) -> Iterator[Database]:
    """The database by a superuser whose sessions would take a thousand workers."""
    execute(database, "CREATE ROLE greedy SUPERUSER LOGIN")
    execute(database, "ALTER ROLE greedy SET max_parallel_maintenance_workers = 1000")
    try:
        yield Database(database.name, database.url.set(username="greedy"))
    finally:
        execute(database, "DROP ROLE greedy")


@pytest.mark.parametrize("soon_bytes", [0, 1 << 40])
def test_an_index_that_is_made_alone_on_this_machine_gets_as_many_workers_as_other_cores(
    make_database: Make, local_store: LocalStore, soon_bytes: int
) -> None:
    cores = len(os.sched_getaffinity(0))
    database = make_database(
        "helped",
        "CREATE FUNCTION proven(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN"
        " IF current_database() LIKE '%athena_r%' AND current_setting('max_parallel_maintenance_workers')::int"
        f" <> {cores - 1} THEN RAISE EXCEPTION 'there are too many or too few'; END IF; RETURN $1; END $$;"
        "CREATE TABLE t AS SELECT i FROM generate_series(1, 100) i; CREATE INDEX ON t (proven(i))",
    )
    component = dump(database, local_store, **ALL_BY_COPY)
    with greedy_role(database) as greedy:
        restore(component, greedy, local_store, jobs=2, soon_bytes=soon_bytes)
    assert rows(database, "SELECT count(*) FROM pg_indexes WHERE tablename = 't'") == [(1,)]


def test_nothing_is_made_of_a_table_before_the_dump_s_own_rows_are_in(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index may call an extension's function, and that read what the extension is configured by: rows of the dump."""
    plans: list[Plan] = []

    class Kept(Plan):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            plans.append(self)

    monkeypatch.setattr(load, "Plan", Kept)
    database = make_database(
        "ordered", "CREATE TABLE t AS SELECT i FROM generate_series(1, 100) i; CREATE INDEX ON t (i)"
    )
    restore(dump(database, local_store, **ALL_BY_COPY), database, local_store, soon_bytes=0)
    [plan] = plans
    before: list[set[int]] = []
    for unit in plan.units:
        before.append(set(unit.after).union(*(before[number] for number in unit.after)))
    made = [needs for needs in before if needs]
    assert len(made) >= 2, "the index, and ANALYZE of its table"
    assert all(0 in needs for needs in made)


def test_a_server_behind_a_relay_is_another_machines_and_decides_itself(make_database: Make) -> None:
    database = make_database("far", "SELECT 1")
    with session(database.url) as connection:
        assert IndexWorkers.of(connection).allowed == 2
    with relayed(database.url.port or 0) as port, session(database.url.set(port=port)) as connection:
        assert IndexWorkers.of(connection).allowed is None


def test_what_the_url_says_of_workers_is_left_alone(make_database: Make, local_store: LocalStore) -> None:
    database = make_database(
        "told",
        "CREATE FUNCTION proven(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN"
        " IF current_database() LIKE '%athena_r%' AND current_setting('max_parallel_maintenance_workers') <> '77'"
        " THEN RAISE EXCEPTION 'they are others'; END IF; RETURN $1; END $$;"
        "CREATE TABLE t AS SELECT i FROM generate_series(1, 100) i; CREATE INDEX ON t (proven(i))",
    )
    component = dump(database, local_store, **ALL_BY_COPY)
    url = database.url.update_query_dict({"options": "-c max_parallel_maintenance_workers=77"})
    restore(component, Database(database.name, url), local_store, jobs=2, soon_bytes=0)
    assert rows(database, "SELECT count(*) FROM pg_indexes WHERE tablename = 't'") == [(1,)]


@pytest.mark.parametrize(
    ("allowed", "cores", "others", "expected"),
    [(2, 2, 1, 0), (2, 2, 0, 1), (2, 16, 1, 2), (8, 16, 3, 3), (8, 2, 7, 0), (2, 1, 0, 0), (None, 2, 1, None)],
)
def test_parallel_workers_share_the_cores_and_another_machines_server_decides_itself(
    allowed: int | None, cores: int, others: int, expected: int | None
) -> None:
    assert IndexWorkers(allowed, cores).beside(others) == expected
