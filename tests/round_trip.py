"""The steps of a database's way into a store and back, as several test files take them."""

import os
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime

from sqlalchemy import URL, text

from athena_backup.crew import Crew
from athena_backup.manifest import Component
from athena_backup.names import SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.postgres.cut import hold_cut
from athena_backup.postgres.dump import write_database
from athena_backup.postgres.embedded import binaries
from athena_backup.postgres.preflight import preflight_database
from athena_backup.postgres.rename import switch_database
from athena_backup.postgres.sessions import Database, libpq_environment, run_sql, session
from athena_backup.postgres.staging import (
    StagedDatabase,
    discard_staging,
    stage_database,
)
from athena_backup.store import Store

SET = SetId("app", Timestamp.of(datetime.now(UTC)))
RESTORE = "0123456789ab"
Make = Callable[..., Database]


ALL_BY_COPY = {"bulk_bytes": 0, "range_bytes": 64 << 10}
"""Every table is read by a COPY of its own, and all but the smallest in several ranges."""


def dump(
    database: Database, store: Store, *, jobs: int = 2, operation: Operation | None = None, **sizes: int
) -> Component:
    operation = operation or Operation()
    with hold_cut([database], operation) as cut:
        return write_database(
            *(database, cut, store, SET, "run", operation),
            crew=Crew(jobs),
            client_directories=[binaries()],
            **sizes,
        )


def stage(component: Component, target: Database, store: Store, *, jobs: int = 2, **sizes: int) -> StagedDatabase:
    assert preflight_database(component, target, RESTORE, [binaries()]) == []
    return stage_database(
        *(component, target, store, RESTORE, Operation()),
        crew=Crew(jobs),
        client_directories=[binaries()],
        **sizes,
    )


def restore(component: Component, target: Database, store: Store, *, jobs: int = 2, **sizes: int) -> None:
    staged = stage(component, target, store, jobs=jobs, **sizes)
    switch_database(target, staged.oid, RESTORE, "app", Operation())
    discard_staging(target, RESTORE)


def rows(database: Database, query: str) -> list[tuple[object, ...]]:
    with session(database.url) as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def stock_dump(url: URL, *options: str) -> list[str]:
    """What pg_dump says of a database, without the lines that differ from run to run."""
    environment = {"PATH": os.environ["PATH"], **libpq_environment(url)}
    command = [str(binaries() / "pg_dump"), "--restrict-key=test", *options]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [line for line in said.splitlines() if not line.startswith("--")]


def big_table(make_database: Make, name: str) -> Database:
    return make_database(name, "CREATE TABLE t AS SELECT i, md5(i::text) x FROM generate_series(1, 200000) i")


def sql(database: Database, *statements: str) -> None:
    with session(database.url, {"search_path": "public"}) as connection:
        for statement in statements:
            run_sql(connection, statement)
