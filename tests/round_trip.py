"""The steps of a database's way into a store and back, as several test files take them."""

from collections.abc import Callable
from datetime import UTC, datetime

from sqlalchemy import text

from athena_backup.crew import Crew
from athena_backup.manifest import Component
from athena_backup.names import SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.postgres.cut import hold_cut
from athena_backup.postgres.dump import write_database
from athena_backup.postgres.embedded import binaries
from athena_backup.postgres.preflight import preflight_database
from athena_backup.postgres.rename import switch_database
from athena_backup.postgres.sessions import Database, session
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


def dump(database: Database, store: Store, *, jobs: int = 2, **sizes: int) -> Component:
    with hold_cut([database], Operation()) as cut:
        return write_database(
            *(database, cut, store, SET, "run", Operation()),
            crew=Crew(jobs),
            client_directories=[binaries()],
            **sizes,
        )


def stage(component: Component, target: Database, store: Store, *, jobs: int = 2) -> StagedDatabase:
    assert preflight_database(component, target, RESTORE, [binaries()]) == []
    return stage_database(
        component, target, store, RESTORE, Operation(), crew=Crew(jobs), client_directories=[binaries()]
    )


def restore(component: Component, target: Database, store: Store, *, jobs: int = 2) -> None:
    staged = stage(component, target, store, jobs=jobs)
    switch_database(target, staged.oid, RESTORE, "app", Operation())
    discard_staging(target, RESTORE)


def rows(database: Database, query: str) -> list[tuple[object, ...]]:
    with session(database.url) as connection:
        return [tuple(row) for row in connection.execute(text(query))]
