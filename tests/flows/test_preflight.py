"""What a restore finds out about the parts of a set before anything is touched."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

from object_stores import PATIENT, Server
from round_trip import SET

from athena_backup.manifest import Component
from athena_backup.operation import Operation
from athena_backup.settings import Settings
from athena_backup.store import Store
from athena_backup.store.local import LocalStore
from athena_backup.volume_archive import Volume, write_volume
from flows.operating import Working
from flows.requests import RestoreRequest
from flows.restore import preflight

REQUEST = RestoreRequest(timestamp=str(SET.timestamp))


def volume_in(store: Store, directory: Path) -> tuple[Component, Working]:
    """A volume that is backed up into the store, and what its restore works with."""
    directory.mkdir()
    (directory / "file").write_bytes(b"content")
    component = write_volume(Volume("gitserver", directory), store, SET, "run", Operation())
    settings = Settings(_env_file=None, athena_volumes={"gitserver": directory})
    return component, SimpleNamespace(settings=settings, store=store, run_id=uuid4())  # type: ignore[return-value]


def test_parts_in_an_archive_class_are_a_fault_before_anything_is_touched(
    open_server: Callable[[str], Server], tmp_path: Path
) -> None:
    server = open_server("moto")
    component, working = volume_in(server.open(PATIENT), tmp_path / "gitserver")
    assert preflight([component], REQUEST, working) == []
    access = server.access
    assert access is not None
    for part in component.parts:
        source = {"Bucket": access.bucket, "Key": part.key}
        access.client().copy_object(Bucket=access.bucket, Key=part.key, CopySource=source, StorageClass="GLACIER")  # type: ignore[arg-type]
    [fault] = preflight([component], REQUEST, working)
    assert fault.component == "gitserver"
    assert "lies in an archive class of the store" in fault.cause
    assert "restore it from the archive first" in fault.next_step


class Unread(LocalStore):
    """A store in a directory of which nothing may be read."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        raise AssertionError(key)


def test_parts_in_a_directory_are_only_looked_at(local_store: LocalStore, tmp_path: Path) -> None:
    component, working = volume_in(Unread(local_store.location.place), tmp_path / "gitserver")
    assert preflight([component], REQUEST, working) == []
    local_store.delete([component.parts[0].key])
    [fault] = preflight([component], REQUEST, working)
    assert "is not in the store as it was written" in fault.cause
