"""A database and a volume go into every kind of store and come back equal; their set is closed, listed and deleted there."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from object_stores import PATIENT, Server
from round_trip import SET, Make, dump, restore, rows

from athena_backup.backup import Expected, close_set, put_component
from athena_backup.catalog import delete_set, find_set, list_sets, whole_manifest
from athena_backup.errors import AbsentError
from athena_backup.manifest import Manifest
from athena_backup.operation import Operation
from athena_backup.postgres.sessions import run_sql, session
from athena_backup.store import Store
from athena_backup.volume_archive import Volume, write_volume
from athena_backup.volume_extract import read_volume

ROWS = "CREATE TABLE t AS SELECT i, md5(i::text) AS v FROM generate_series(1, 50000) i"


def test_a_database_and_a_volume_come_back_equal(store: Store, make_database: Make, tmp_path: Path) -> None:
    asp = make_database("round_trip", ROWS)
    before = rows(asp, "SELECT * FROM public.t ORDER BY i")
    tree = tmp_path / "gitserver"
    (tree / "repositories").mkdir(parents=True)
    content = os.urandom(10_000_000)
    (tree / "repositories" / "pack").write_bytes(content)
    (tree / "link").symlink_to("repositories/pack")

    put_component(store, SET, dump(asp, store))
    # A small limit: the archive goes on in a second part, itself of two upload parts.
    volume = write_volume(Volume("gitserver", tree), store, SET, "run", Operation(), part_limit_bytes=9_000_000)
    put_component(store, SET, volume)
    expected = [Expected("roundtrip", "database"), Expected("gitserver", "volume")]
    outcome = close_set(store, SET, expected, [], run_id="run", began=datetime.now(UTC))
    assert isinstance(outcome, Manifest)
    assert [(one.set_id, one.status) for one in list_sets(store, "app")] == [(SET, "Success")]

    with session(asp.url) as connection:
        run_sql(connection, "DELETE FROM public.t WHERE i > 7")
    components = {component.name: component for component in whole_manifest(store, SET).components}
    restore(components["roundtrip"], asp, store)
    assert rows(asp, "SELECT * FROM public.t ORDER BY i") == before
    target = tmp_path / "restored"
    target.mkdir()
    assert len(components["gitserver"].parts) == 2
    read_volume(components["gitserver"], store, target, Operation())
    assert (target / "repositories" / "pack").read_bytes() == content
    assert (target / "link").readlink() == Path("repositories/pack")

    delete_set(store, SET)
    assert list(store.entries("")) == []
    assert find_set(store, SET) is None


@pytest.mark.parametrize("kind", ["s3", "moto", "gcs"])
def test_what_a_killed_upload_left_of_a_set_that_shows_nothing_else_is_deleted(
    open_server: Callable[[str], Server], kind: str
) -> None:
    server = open_server(kind)
    store, access = server.open(PATIENT), server.access
    assert access is not None
    key = f"{SET.prefix}volumes/gitserver/0123456789ab/0000.tar.zst.0000"
    access.client().create_multipart_upload(Bucket=access.bucket, Key=key)
    assert find_set(store, SET) is None
    delete_set(store, SET)
    assert access.list_uploads("app/") == []
    with pytest.raises(AbsentError):
        delete_set(store, SET)
