"""`pg_dump` and `pg_restore` as children: a cut connection of theirs is noticed, and they end when nobody needs them any more."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from round_trip import SET, Make, dump, restore, rows, stage

from athena_backup.errors import CancelledError, FinalError, PassingError
from athena_backup.operation import Operation
from athena_backup.postgres.cut import hold_cut
from athena_backup.postgres.dump import write_globals
from athena_backup.postgres.embedded import binaries
from athena_backup.postgres.load import Loading
from athena_backup.postgres.sessions import run_sql, session
from athena_backup.store.local import LocalStore

KEEPALIVE, IDLE_SECONDS = "02", 30
"""The timer that a socket waits for, as /proc/net/tcp shows it (proc_net_tcp in the kernel's documentation), and how long."""


class LookingStore(LocalStore):
    """A store that looks at something in the middle of a stream that goes to it or comes from it."""

    def __init__(self, place: str, stream: str, look: Callable[[], None]) -> None:
        super().__init__(place)
        self._stream = stream
        self._look = look

    def write(self, key: str, chunks):  # type: ignore[no-untyped-def]
        return super().write(key, self._looked_at(key, iter(chunks), 0))

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        return self._looked_at(key, super().read(key, start, end), 24)  # behind what is read ahead

    def _looked_at(self, key: str, chunks: Iterator[bytes], behind: int) -> Iterator[bytes]:
        for number, chunk in enumerate(chunks):
            yield chunk
            if number == behind and f"/{self._stream}" in key:
                self._look()


def timers(program: str) -> list[str]:
    """Of all TCP connections that children of ours have which run such a program."""
    inodes: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command, parent = (process / "comm").read_text().strip(), (process / "stat").read_text().rpartition(")")[2]
            if command == program and int(parent.split()[1]) == os.getpid():
                links = [os.readlink(link) for link in (process / "fd").iterdir()]
                inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    timers = [line[5].split(":") for line in lines if line[9] in inodes]
    # In hundredths of a second; the kernel's own keepalives begin after two hours.
    return [timer if int(left, 16) <= IDLE_SECONDS * 100 else f"{timer}, {left}" for timer, left in timers]


def test_connections_of_children_are_looked_after_by_the_kernel(make_database: Make, local_store: LocalStore) -> None:
    database = make_database(
        "kept", "CREATE TABLE t AS SELECT i, md5(i::text) || md5((-i)::text) x FROM generate_series(1, 1000000) i"
    )
    seen: list[list[str]] = []
    programs = iter(["pg_dump", "pg_restore"])

    def look() -> None:
        program, deadline = next(programs), time.monotonic() + 20
        while (found := timers(program)) != [KEEPALIVE]:
            assert time.monotonic() < deadline, found
            threading.Event().wait(0.02)
        seen.append(found)

    store = LookingStore(local_store.location.place, "dump.pgc", look)
    component = dump(database, store, bulk_bytes=1 << 40)
    restore(component, database, store)
    assert seen == [[KEEPALIVE], [KEEPALIVE]]


def test_partitions_are_analyzed_once(make_database: Make, local_store: LocalStore) -> None:
    """From version 18 on ANALYZE of a partitioned table takes its partitions with it, unless it is told not to."""
    parts = "; ".join(
        f"CREATE TABLE parted_{number} PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER {number})"
        for number in range(2)
    )
    database = make_database(
        "parted",
        f"CREATE TABLE parted (i int, x text) PARTITION BY HASH (i); {parts};"
        " INSERT INTO parted SELECT i, md5(i::text) FROM generate_series(1, 5000) i",
    )
    component = dump(database, local_store, bulk_bytes=1 << 40)
    restore(component, database, local_store)
    analyzed = "SELECT relname, analyze_count FROM pg_stat_user_tables WHERE relname LIKE 'parted_%' ORDER BY 1"
    deadline = time.monotonic() + 20
    while not all(count for _, count in rows(database, analyzed)):
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
    assert rows(database, analyzed) == [("parted_0", 1), ("parted_1", 1)]
    assert rows(database, "SELECT count(*) FROM pg_stats WHERE tablename = 'parted'") == [(2,)]


def test_an_index_that_is_still_made_when_another_table_fails_keeps_nobody(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = make_database(
        "waiting",
        "CREATE TABLE t AS SELECT 1 AS i; CREATE INDEX slow ON t (i); CREATE TABLE u AS SELECT 2 AS i",
    )
    component = dump(database, local_store, bulk_bytes=0)
    real = Loading.load
    locking = contextlib.ExitStack()

    def failing(loading: Loading, streams, turn, *, are_all: bool) -> None:  # type: ignore[no-untyped-def]
        table = streams[0].table
        assert table is not None
        if table.name == "t":
            real(loading, streams, turn, are_all=are_all)
            run_sql(
                locking.enter_context(session(loading.staging.url)), "BEGIN; LOCK TABLE public.t IN ROW EXCLUSIVE MODE"
            )
            return
        deadline = time.monotonic() + 30
        while not rows(database, "SELECT FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX slow %'"):
            assert time.monotonic() < deadline
            threading.Event().wait(0.02)
        raise FinalError("made up")

    monkeypatch.setattr(Loading, "load", failing)
    began = time.monotonic()
    with locking, pytest.raises(FinalError, match="made up"):
        stage(component, database, local_store, soon_bytes=0)
    assert time.monotonic() - began < 55, "a crew that waits for a unit in vain gives up after a minute"


def test_the_sessions_that_load_a_restore_do_not_wait_for_the_disk(
    make_database: Make, local_store: LocalStore
) -> None:
    """A commit for each of ten thousand tables would else wait for the disk; the view is filled by the session that restores it."""
    database = make_database(
        "hurried", "CREATE MATERIALIZED VIEW told AS SELECT current_setting('synchronous_commit') AS setting"
    )
    assert rows(database, "SELECT setting FROM public.told") == [("on",)]
    restore(dump(database, local_store), database, local_store)
    assert rows(database, "SELECT setting FROM public.told") == [("off",)]
    assert rows(database, "SHOW synchronous_commit") == [("on",)]


def test_a_pg_dumpall_that_says_nothing_is_given_up_or_cancelled(
    make_database: Make, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hanging = tmp_path / "pg_dumpall"
    program = binaries() / "pg_dumpall"
    hanging.write_text(f'#!/bin/bash\n[ "$1" = --version ] && exec {program} "$@"; exec sleep 600\n')
    hanging.chmod(0o755)
    database = make_database("hanging")
    operation = Operation()
    with hold_cut([database], Operation()) as cut:
        held = cut.of("hanging")
        monkeypatch.setattr("athena_backup.postgres.dump._GLOBALS_LIMIT_SECONDS", 1)
        with pytest.raises(PassingError, match="pg_dumpall took longer than 1 s"):
            write_globals(held, local_store, SET, operation, [tmp_path])
        monkeypatch.setattr("athena_backup.postgres.dump._GLOBALS_LIMIT_SECONDS", 600)
        threading.Timer(0.2, lambda: operation.cancel("a person said so")).start()
        with pytest.raises(CancelledError, match="a person said so"):
            write_globals(held, local_store, SET, operation, [tmp_path])
