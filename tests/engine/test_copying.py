"""A set copied into another store restores from there; what is not whole, or another's, is never taken for a copy."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from object_stores import MOTO_KEYS, moto_server

from athena_backup.backup import Expected, close_set, put_component, put_failed_component
from athena_backup.catalog import SetState, list_sets, whole_manifest
from athena_backup.copying import copy_set
from athena_backup.errors import AbsentError, CancelledError, DamagedError, FinalError, UnavailableError
from athena_backup.manifest import FAILURE, INSTRUCTIONS, MANIFEST, Component, Manifest, Stream, component_folder
from athena_backup.names import SetId, Timestamp, new_attempt
from athena_backup.operation import Operation
from athena_backup.pipeline import Source, read_stream, write_stream
from athena_backup.store import Entry, Store, UnsettledError, read_document
from athena_backup.store.clients import open_s3
from athena_backup.store.local import LocalStore, initialize
from athena_backup.store.objects import ObjectStore
from deployments.embedded_stores import BUCKET, REGION, EmbeddedS3, embedded_s3

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
PART_BYTES = 300_000
CONTENT = {"gitserver": os.urandom(2_500_000), "edweb": b"small"}


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with embedded_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def s3(s3_server: EmbeddedS3) -> ObjectStore:
    return open_s3(s3_server.bucket, s3_server.endpoint, s3_server.region, s3_server.keys)


@pytest.fixture
def set_id(request: pytest.FixtureRequest) -> SetId:
    """A set of a namespace of its own for each test: all share one server."""
    return SetId(f"app-{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}", Timestamp.of(NOW))


@pytest.fixture
def local_target(tmp_path: Path) -> LocalStore:
    root = tmp_path / "second"
    root.mkdir()
    initialize(root)
    return LocalStore(str(root))


@pytest.fixture(params=["local", "s3"])
def target(request: pytest.FixtureRequest, local_target: LocalStore) -> Store:
    chosen: Store = local_target if request.param == "local" else request.getfixturevalue("s3")
    return chosen


@pytest.fixture
def manifest(local_store: LocalStore, set_id: SetId) -> Manifest:
    """A set in the source as a backup leaves it, the litter of a failed attempt included."""
    return make_set(local_store, set_id)


def make_set(store: Store, set_id: SetId) -> Manifest:
    expected = [Expected(name, "volume") for name in CONTENT]
    fault = UnavailableError("the network was gone").fault(component="gitserver", step="archiving")
    put_failed_component(store, set_id, expected[0], "run", NOW, fault)
    for one in expected:
        attempt = new_attempt()
        folder = component_folder(set_id, one.kind, one.name, attempt)
        parts = write_stream(
            Source(one.name, lambda operation, name=one.name: pieces(CONTENT[name])),  # type: ignore[misc]
            store,
            lambda number, folder=folder: f"{folder}0000.tar.zst.{number:04}",  # type: ignore[misc]
            Operation(),
            part_limit_bytes=PART_BYTES,
        )
        component = Component(
            name=one.name, kind=one.kind, attempt=attempt, run_id="run", state="complete", began=NOW, ended=NOW,
            streams=(Stream(name="0000.tar.zst", parts=parts),),
        )  # fmt: skip
        put_component(store, set_id, component)
    store.put(f"{set_id.prefix}globals/0.sql.zst", b"roles")
    outcome = close_set(store, set_id, expected, [], run_id="run", began=NOW)
    assert isinstance(outcome, Manifest)
    return outcome


def pieces(data: bytes) -> Iterator[bytes]:
    return (data[start : start + 100_000] for start in range(0, len(data), 100_000))


def assert_restorable(store: Store, manifest: Manifest) -> None:
    assert whole_manifest(store, manifest.set_id) == manifest
    for component in manifest.components:
        assert b"".join(read_stream(component.name, component.parts, store, Operation())) == CONTENT[component.name]


class Watched(LocalStore):
    """A local store that does something at its nth chunk read, or counts what is written."""

    def __init__(self, store: LocalStore, at: int = -1, act: Callable[[], None] = lambda: None) -> None:
        super().__init__(store.location.place)
        self.at, self.act, self.chunks = at, act, 0

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        for chunk in super().read(key, start, end):
            if ".tar.zst." in key:
                if self.chunks == self.at:
                    self.act()
                self.chunks += 1
            yield chunk


def break_off() -> None:
    raise UnavailableError("the line was cut")


def test_a_copy_has_every_object_of_the_set_and_restores_from_there(
    local_store: LocalStore, target: Store, manifest: Manifest
) -> None:
    operation = Operation()
    copied = copy_set(local_store, target, manifest.set_id, operation)
    assert_restorable(target, manifest)
    assert (
        copied.sent_bytes
        == copied.size_bytes
        == sum(part.size_bytes for one in manifest.components for part in one.parts)
    )
    assert copied.parts == sum(len(one.parts) for one in manifest.components)
    prefix = manifest.set_id.prefix
    there = {entry.key: read_document(target, entry.key) for entry in target.entries(prefix)}
    here = {entry.key: read_document(local_store, entry.key) for entry in local_store.entries(prefix)}
    litter = {key for key in here.keys() - there.keys() if key.endswith("/component.json")}
    assert here.keys() - there.keys() == litter
    assert len(litter) == 1
    assert there == {key: here[key] for key in there}
    assert {prefix + "RESTORE.md", prefix + "globals/0.sql.zst", prefix + MANIFEST} <= there.keys()
    assert {one.component: one.done_bytes for one in operation.progress()} == {
        one.name: sum(part.size_bytes for part in one.parts) for one in manifest.components
    }


def test_a_set_that_lost_its_instructions_is_copied_with_them(
    local_store: LocalStore, local_target: LocalStore, manifest: Manifest
) -> None:
    """As a deletion leaves it that was killed at its beginning, or that the store refused."""
    key = manifest.set_id.prefix + INSTRUCTIONS
    before = read_document(local_store, key)
    local_store.delete([key])
    copy_set(local_store, local_target, manifest.set_id, Operation())
    assert_restorable(local_target, manifest)
    assert read_document(local_target, key) == before


def test_a_copy_back_out_of_an_object_store_restores_too(
    local_store: LocalStore, s3: ObjectStore, local_target: LocalStore, manifest: Manifest
) -> None:
    copy_set(local_store, s3, manifest.set_id, Operation())
    copy_set(s3, local_target, manifest.set_id, Operation())
    assert_restorable(local_target, manifest)


def test_copying_again_sends_nothing_and_changes_nothing(
    local_store: LocalStore, target: Store, manifest: Manifest
) -> None:
    copy_set(local_store, target, manifest.set_id, Operation())
    before = list(target.entries(manifest.set_id.prefix))
    assert copy_set(local_store, target, manifest.set_id, Operation()).sent_bytes == 0
    assert list(target.entries(manifest.set_id.prefix)) == before


def test_a_copy_that_was_broken_off_is_no_set_and_is_completed_by_the_next(
    local_store: LocalStore, target: Store, manifest: Manifest
) -> None:
    source = Watched(local_store, at=5, act=break_off)
    with pytest.raises(UnavailableError, match="the line was cut"):
        copy_set(source, target, manifest.set_id, Operation())
    assert [one.state for one in list_sets(target, manifest.namespace)] == [SetState.UNFINISHED]
    standing = sum(entry.size_bytes for entry in target.entries(manifest.set_id.prefix))
    assert standing > 0
    copied = copy_set(local_store, target, manifest.set_id, Operation())
    assert copied.sent_bytes == copied.size_bytes - standing
    assert_restorable(target, manifest)


def test_a_byte_flipped_in_the_source_is_never_stored(
    local_store: LocalStore, target: Store, manifest: Manifest
) -> None:
    victim = manifest.components[0].parts[2].key
    file = Path(local_store.location.place) / victim
    damaged = bytearray(file.read_bytes())
    damaged[1_000] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(DamagedError, match=victim):
        copy_set(local_store, target, manifest.set_id, Operation())
    assert target.head(victim) is None
    assert target.head(manifest.set_id.prefix + MANIFEST) is None


def test_a_part_that_stands_in_the_target_with_other_bytes_is_not_believed(
    local_store: LocalStore, target: Store, manifest: Manifest
) -> None:
    part = manifest.components[0].parts[1]
    target.put(part.key, b"\0" * part.size_bytes)
    with pytest.raises(DamagedError, match="is not the set's"):
        copy_set(local_store, target, manifest.set_id, Operation())
    assert target.head(manifest.set_id.prefix + MANIFEST) is None


def test_a_cancel_stops_a_copy_and_leaves_no_set(local_store: LocalStore, target: Store, manifest: Manifest) -> None:
    operation = Operation()
    source = Watched(local_store, at=4, act=lambda: operation.cancel("somebody cancelled it"))
    with pytest.raises(CancelledError, match="somebody cancelled it"):
        copy_set(source, target, manifest.set_id, operation)
    assert target.head(manifest.set_id.prefix + MANIFEST) is None
    assert source.chunks == 5


def test_a_cancel_ends_a_copy_whose_target_hangs(
    local_store: LocalStore, local_target: LocalStore, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation, released = Operation(), threading.Event()

    def hangs(self: LocalStore, key: str, chunks: Iterable[bytes]) -> Entry:
        operation.cancel("somebody cancelled it")
        released.wait(60)
        raise UnavailableError("too late")

    monkeypatch.setattr("athena_backup.pipeline._GRACE_SECONDS", 0.1)
    monkeypatch.setattr(LocalStore, "write", hangs)
    with pytest.raises(CancelledError):
        copy_set(local_store, local_target, manifest.set_id, operation)
    released.set()


def test_what_is_no_success_is_not_copied(local_store: LocalStore, target: Store, set_id: SetId) -> None:
    with pytest.raises(AbsentError):
        copy_set(local_store, target, set_id, Operation())
    fault = FinalError("the disk was full").fault(step="archiving")
    close_set(local_store, set_id, [], [fault], run_id="run", began=NOW)
    with pytest.raises(FinalError, match="the disk was full"):
        copy_set(local_store, target, set_id, Operation())
    make_set(local_store, set_id)
    local_store.put(f"{set_id.namespace}/marks/{set_id.timestamp}/deleting", b"")
    with pytest.raises(FinalError, match="being deleted"):
        copy_set(local_store, target, set_id, Operation())
    assert list(target.entries(set_id.prefix)) == []


@pytest.mark.parametrize("other", ["another", "unfinished", "failed", "deleting"])
def test_another_set_of_the_same_name_in_the_target_is_left_as_it_is(
    local_store: LocalStore, target: Store, manifest: Manifest, other: str
) -> None:
    set_id = manifest.set_id
    if other == "another":
        make_set(target, set_id)
    elif other == "unfinished":
        target.put(component_folder(set_id, "volume", "gitserver", new_attempt()) + "0000.tar.zst.0000", b"theirs")
    elif other == "failed":
        target.put(set_id.prefix + FAILURE, b"theirs")
    else:
        target.put(f"{set_id.namespace}/marks/{set_id.timestamp}/deleting", b"")
    before = [(entry.key, entry.modified) for entry in target.entries(f"{set_id.namespace}/")]
    with pytest.raises(FinalError, match=r"another set|being deleted"):
        copy_set(local_store, target, set_id, Operation())
    assert [(entry.key, entry.modified) for entry in target.entries(f"{set_id.namespace}/")] == before


def test_the_store_itself_is_no_place_for_a_copy(local_store: LocalStore, manifest: Manifest) -> None:
    with pytest.raises(FinalError, match="is the store that the set is in"):
        copy_set(local_store, LocalStore(local_store.location.place), manifest.set_id, Operation())


def test_the_store_itself_by_another_name_is_no_place_for_a_copy(
    local_store: LocalStore, manifest: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "second").symlink_to(local_store.location.place)
    for place in (f"{local_store.location.place}/", str(tmp_path / "second")):
        with pytest.raises(FinalError, match="is the store that the set is in"):
            copy_set(local_store, LocalStore(place), manifest.set_id, Operation())


def test_the_bucket_itself_in_another_region_is_no_place_for_a_copy(
    local_store: LocalStore, s3: ObjectStore, manifest: Manifest
) -> None:
    """Which a server of one's own takes for the same."""
    with moto_server() as address:
        first, second = (open_s3(BUCKET, address, region, MOTO_KEYS) for region in (REGION, "eu-west-1"))
        copy_set(local_store, first, manifest.set_id, Operation())
        with pytest.raises(FinalError, match="is the store that the set is in"):
            copy_set(first, second, manifest.set_id, Operation())


def test_the_bucket_itself_by_another_name_of_its_server_is_no_place_for_a_copy(
    local_store: LocalStore, s3: ObjectStore, s3_server: EmbeddedS3, manifest: Manifest
) -> None:
    other_name = s3_server.endpoint.replace("127.0.0.1", "localhost")
    assert other_name != s3_server.endpoint
    second = open_s3(s3_server.bucket, other_name, s3_server.region, s3_server.keys)
    copy_set(local_store, s3, manifest.set_id, Operation())
    before = [entry.key for entry in s3.entries(f"{manifest.set_id.namespace}/")]
    with pytest.raises(FinalError, match="is the store that the set is in, by another name"):
        copy_set(s3, second, manifest.set_id, Operation())
    assert [entry.key for entry in s3.entries(f"{manifest.set_id.namespace}/")] == before


def test_another_server_s_bucket_of_the_same_name_and_region_is_a_place_for_a_copy(
    local_store: LocalStore, s3: ObjectStore, manifest: Manifest
) -> None:
    copy_set(local_store, s3, manifest.set_id, Operation())
    with moto_server() as address:
        second = open_s3(BUCKET, address, REGION, MOTO_KEYS)
        copy_set(s3, second, manifest.set_id, Operation())
        assert_restorable(second, manifest)


def test_what_a_killed_copy_was_sending_goes_with_the_next_one_and_nobody_else_s_upload_does(
    local_store: LocalStore, s3_server: EmbeddedS3, manifest: Manifest
) -> None:
    target = open_s3(s3_server.bucket, s3_server.endpoint, s3_server.region, s3_server.keys)
    ours = manifest.components[0].parts[0].key
    prefix = manifest.set_id.prefix
    theirs = [f"{prefix}volumes/gitserver/{new_attempt()}/0000.tar.zst.0000", f"other-{ours}"]
    for key in (ours, *theirs):
        s3_server.access.client().create_multipart_upload(Bucket=s3_server.bucket, Key=key)
    copy_set(local_store, target, manifest.set_id, Operation())
    left = [key for key, _ in s3_server.access.list_uploads("")]
    assert sorted(left) == sorted(theirs)
    assert_restorable(target, manifest)


def test_a_part_whose_last_answer_was_lost_counts_only_once_it_was_read_back(
    local_store: LocalStore, local_target: LocalStore, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, read = LocalStore.write, LocalStore.read
    seen: list[str] = []

    def loses_its_answer(self: LocalStore, key: str, chunks: Iterable[bytes]) -> Entry:
        raise UnsettledError("the connection was cut", entry=real(self, key, chunks))

    def noted(self: LocalStore, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        if self is local_target:
            seen.append(key)
        return read(self, key, start, end)

    monkeypatch.setattr(LocalStore, "write", loses_its_answer)
    monkeypatch.setattr(LocalStore, "read", noted)
    copy_set(local_store, local_target, manifest.set_id, Operation())
    assert {part.key for one in manifest.components for part in one.parts} <= set(seen)
    assert_restorable(local_target, manifest)


def test_a_part_that_vanishes_from_the_target_in_the_meantime_keeps_the_manifest_away(
    local_store: LocalStore, local_target: LocalStore, manifest: Manifest
) -> None:
    first, last = manifest.components[0].parts[0].key, sum(len(one.parts) for one in manifest.components) - 1
    source = Watched(local_store, at=last, act=lambda: local_target.delete([first]))
    with pytest.raises(FinalError, match=f"{first} is not whole"):
        copy_set(source, local_target, manifest.set_id, Operation())
    assert local_target.head(manifest.set_id.prefix + MANIFEST) is None
