"""A list of many sets: how often the store is asked, what of large manifests is read, and what is never looked at."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import obstore
import pytest

from athena_backup.catalog import GLANCE_BYTES, SetState, delete_set, find_set, list_sets, nothing_of, whole_manifest
from athena_backup.errors import (
    AbsentError,
    DamagedError,
    DeniedError,
    FinalError,
    UnavailableError,
    UnusableSetError,
)
from athena_backup.manifest import (
    FAILURE,
    MANIFEST,
    Component,
    Failure,
    Manifest,
    ManifestHead,
    Part,
    Stream,
    component_folder,
    read_manifest_head,
    to_json,
)
from athena_backup.names import SetId, Timestamp
from athena_backup.store import Store, read_document
from athena_backup.store.clients import open_s3
from athena_backup.store.local import LocalStore
from athena_backup.store.objects import ObjectStore
from deployments.embedded_stores import embedded_s3

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
ATTEMPT = "0123456789ab"
SMALL, LARGE = 3, 600


def set_id(number: int, namespace: str = "app") -> SetId:
    return SetId(namespace, Timestamp.of(NOW + timedelta(hours=number)))


def manifest(number: int, parts: int, namespace: str = "app") -> Manifest:
    folder = component_folder(set_id(number, namespace), "volume", "gitserver", ATTEMPT)
    made = tuple(
        Part(key=f"{folder}0000.tar.zst.{one:04}", size_bytes=1, raw_size_bytes=1, sha256="0" * 64)
        for one in range(parts)
    )
    component = Component(
        name="gitserver", kind="volume", attempt=ATTEMPT, run_id="run", state="complete", began=NOW, ended=NOW,
        streams=(Stream(name="0000.tar.zst", parts=made),),
    )  # fmt: skip
    return Manifest(
        namespace=namespace, timestamp=str(set_id(number).timestamp), run_id="run", software="test", began=NOW, ended=NOW,
        proved_by="digest", servers=(), components=(component,),
    )  # fmt: skip


def failure(number: int) -> Failure:
    fault = FinalError("the disk was full").fault(component="gitserver", step="archiving", at=NOW)
    return Failure(
        namespace="app", timestamp=str(set_id(number).timestamp), run_id="run", software="test", began=NOW, ended=NOW,
        faults=(fault,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with embedded_s3(tmp_path_factory.mktemp("s3")) as server:
        yield open_s3(server.bucket, server.endpoint, server.region, server.keys)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, local_store: LocalStore) -> Iterator[Store]:
    chosen: Store = local_store if request.param == "local" else request.getfixturevalue("object_store")
    yield chosen
    chosen.delete([entry.key for entry in chosen.entries("")])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often an object store was asked for what: each of these calls is one request on the wire."""
    counted: Counter[str] = Counter()
    lock = threading.Lock()

    def count(name: str) -> None:
        real = getattr(obstore, name)

        def call(*arguments: object, **options: object) -> object:
            with lock:
                counted[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(obstore, name, call)

    for name in ("get", "get_range", "get_ranges", "head", "list", "list_with_delimiter", "put", "delete"):
        count(name)
    return counted


def test_a_list_asks_for_two_listings_and_one_read_a_set(object_store: ObjectStore, asked: Counter[str]) -> None:
    sets, namespace = 60, "counted"
    for number in range(sets):
        content = manifest(number, LARGE if number % 2 else SMALL, namespace)
        for part in content.components[0].parts[:5]:
            object_store.put(part.key, b"x")
        object_store.put(set_id(number, namespace).prefix + MANIFEST, to_json(content))
    object_store.put(f"{namespace}/marks/{set_id(7).timestamp}/deleting", b"")
    asked.clear()
    found = list(list_sets(object_store, namespace))
    assert asked == {"list_with_delimiter": 1, "list": 1, "get": sets}
    assert [one.set_id for one in found] == [set_id(number, namespace) for number in range(sets)]
    assert {one.state for one in found[:7] + found[8:]} == {SetState.SUCCESS}
    assert found[7].state is SetState.DELETING


def test_the_looks_are_taken_side_by_side_and_no_further_than_is_asked_for(
    local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = 300
    for number in range(sets):
        local_store.put(set_id(number).prefix + MANIFEST, to_json(manifest(number, SMALL)))
    together, read, lock = threading.Barrier(16), [], threading.Lock()
    real = LocalStore.read

    def met(self: LocalStore, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        with lock:
            read.append(key)
        if len(read) <= 16:
            together.wait(30)
        return real(self, key, start, end)

    monkeypatch.setattr(LocalStore, "read", met)
    listed = list_sets(local_store, "app")
    assert next(listed).set_id == set_id(0)
    listed.close()  # type: ignore[attr-defined]
    assert 16 <= len(read) < sets


def test_a_set_that_was_deleted_is_in_no_list(store: Store) -> None:
    for number in range(2):
        store.put(set_id(number).prefix + MANIFEST, to_json(manifest(number, SMALL)))
        store.put(manifest(number, SMALL).components[0].parts[0].key, b"x")
    delete_set(store, set_id(0))
    assert [one.set_id for one in list_sets(store, "app")] == [set_id(1)]


def test_every_kind_of_set_is_listed_in_its_order(store: Store) -> None:
    store.put(set_id(0).prefix + MANIFEST, to_json(manifest(0, SMALL)))
    store.put(set_id(1).prefix + MANIFEST, to_json(manifest(1, LARGE)))
    store.put(set_id(2).prefix + FAILURE, to_json(failure(2)))
    store.put(set_id(3).prefix + "volumes/x", b"being written")
    store.put(set_id(4).prefix + MANIFEST, to_json(manifest(4, LARGE).model_copy(update={"state": "abandoned"})))
    store.put(set_id(5).prefix + MANIFEST, to_json(manifest(6, LARGE)))
    store.put(set_id(6).prefix + MANIFEST, b"")
    states = [SetState.SUCCESS, SetState.SUCCESS, SetState.FAILED, SetState.UNFINISHED, SetState.FAILED]
    found = list(list_sets(store, "app"))
    assert [one.set_id for one in found] == [set_id(number) for number in range(7)]
    assert [one.state for one in found] == [*states, SetState.FAILED, SetState.FAILED]
    assert [find_set(store, one.set_id).state for one in found] == [one.state for one in found]  # type: ignore[union-attr]
    assert "belongs to another set" in found[5].status
    assert "is not a document of ours" in found[6].status


def test_what_lies_beside_the_sets_is_neither_read_nor_touched(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = {
        "beside/audit/2026/11/log.json": b'{"state": "complete"}',
        "beside/audit/manifest.json": b"not ours",
        "beside/operations/x.json": b"ours, but no set",
        "beside/2026-99-99t00-00-00/manifest.json": b"no such day",
        "beside/2026-11-23T12-00-00/manifest.json": b"an upper-case T",
        "beside/2026-11-23t12-00-00.bak/manifest.json": b"somebody's copy",
        "beside/2026-11-22t12-00-00": b"a file that is named like a set",
        "beside/notes.txt": b"by a person",
        "besides/2026-11-23t12-00-00/manifest.json": b"another namespace",
        "2026-11-23t12-00-00/manifest.json": b"no namespace",
    }
    for key, data in foreign.items():
        store.put(key, data)
    store.put(set_id(0, "beside").prefix + MANIFEST, to_json(manifest(0, SMALL, "beside")))
    read: list[str] = []
    with monkeypatch.context() as patched:
        real = type(store).read

        def noted(self: Store, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
            read.append(key)
            return real(self, key, start, end)  # type: ignore[arg-type]

        patched.setattr(type(store), "read", noted)
        [found] = list_sets(store, "beside")
    assert found.state is SetState.SUCCESS
    assert read == [set_id(0, "beside").prefix + MANIFEST]
    assert {key: read_document(store, key) for key in foreign} == foreign


def test_who_looks_in_the_wrong_namespace_is_told_which_there_may_be(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a b/2026-11-23t12-00-00/manifest.json", b"")
    for namespace in ("app", "prod"):
        store.put(set_id(0, namespace).prefix + MANIFEST, b"")
    told, _, folders = nothing_of(store, "new").rpartition(": ")
    assert told == "no set of namespace new in this store; its folders, each of which may be a namespace"
    named = set(folders.split(", "))
    assert {"app", "prod"} <= named  # some servers go on naming those of objects that were deleted
    assert "a b" not in named
    for call in (whole_manifest, delete_set):
        with pytest.raises(AbsentError) as refused:
            call(store, set_id(0, "new"))
        assert refused.value.cause == f"there is no backup set {set_id(0, 'new')}"
        assert "`athena-backup list --namespace new`" in refused.value.next_step

    def refuse(self: Store, prefix: str) -> Iterator[str]:
        raise UnavailableError(prefix)

    monkeypatch.setattr(type(store), "folders", refuse)
    assert nothing_of(store, "app") == "no set of namespace app in this store"


class TestHead:
    """Of a manifest beyond `GLANCE_BYTES` a list reads the beginning, everybody else the whole."""

    def test_what_a_list_needs_stands_at_the_beginning_of_every_manifest(self) -> None:
        document = json.loads(to_json(manifest(0, SMALL)))
        assert list(document)[: len(ManifestHead.model_fields)] == list(ManifestHead.model_fields)
        assert {"schema_version", "namespace", "timestamp", "state"} <= ManifestHead.model_fields.keys()
        whole = to_json(manifest(0, LARGE))
        assert len(whole) > GLANCE_BYTES
        head = read_manifest_head(whole[:1_024], "manifest.json")
        assert head is not None
        assert (head.set_id, head.state) == (set_id(0), "complete")

    def test_a_beginning_cut_anywhere_tells_the_head_or_that_it_does_not(self) -> None:
        whole = to_json(manifest(0, SMALL).model_copy(update={"software": "größe 鍵" * 10}))
        told = [read_manifest_head(whole[:length], "x") for length in range(len(whole))]
        first = next(length for length, one in enumerate(told) if one is not None)
        assert whole[:first].count(b"\n") == len(ManifestHead.model_fields) + 1
        assert all(one is not None and one.state == "complete" for one in told[first:])

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (b'"schema_version": "2.0"', b'"schema_version": "3.0"'),
            (b'"timestamp": "2026', b'"timestamp": "x026'),
            (b'"namespace": "app"', b'"namespace": "../app"'),
            (b'"state": "complete"', b'"state": "splendid"'),
            (b'"state": "complete"', b'"mood": "complete"'),
        ],
    )
    def test_a_large_manifest_whose_head_cannot_be_true_is_no_success(
        self, store: Store, old: bytes, new: bytes
    ) -> None:
        whole = to_json(manifest(0, LARGE)).replace(old, new, 1)
        if b"mood" in new:
            # Without its state it would be taken for complete by its default: what is missing is looked for in the rest.
            whole = whole.rstrip()[:-1] + b',"state": "abandoned"}'
        store.put(set_id(0).prefix + MANIFEST, whole)
        [found] = list_sets(store, "app")
        assert found.state is SetState.FAILED

    def test_another_order_of_members_is_read_to_the_end(self, store: Store) -> None:
        document = json.loads(to_json(manifest(0, LARGE)))
        reordered = {"components": document.pop("components"), **document}
        store.put(set_id(0).prefix + MANIFEST, json.dumps(reordered).encode())
        [found] = list_sets(store, "app")
        assert found.state is SetState.SUCCESS

    def test_a_restore_still_reads_and_checks_everything(self, store: Store) -> None:
        whole = to_json(manifest(0, LARGE))
        store.put(set_id(0).prefix + MANIFEST, whole[:-1_000])
        assert [one.state for one in list_sets(store, "app")] == [SetState.SUCCESS]
        found = find_set(store, set_id(0))
        assert found is not None
        assert found.state is SetState.FAILED
        with pytest.raises(FinalError, match="can't be restored"):
            whole_manifest(store, set_id(0))

    def test_a_newer_major_version_is_refused_by_the_head_alone(self) -> None:
        newer = to_json(manifest(0, LARGE).model_copy(update={"schema_version": "3.0"}))
        with pytest.raises(FinalError, match="newer version of athena-backup"):
            read_manifest_head(newer[:GLANCE_BYTES], "manifest.json")
        with pytest.raises(DamagedError):
            read_manifest_head(newer.replace(b"3.0", b"two", 1)[:GLANCE_BYTES], "manifest.json")


class TestRefused:
    """A set of which the store does not hand out the documents: archived, another account's, a folder of root's."""

    @staticmethod
    def refuse(monkeypatch: pytest.MonkeyPatch, store: Store, prefix: str) -> None:
        """Let the store refuse to read, and to list, what lies below the prefix."""

        def guard(name: str) -> None:
            real = getattr(type(store), name)

            def call(self: Store, key: str, *arguments: object) -> Iterator[object]:
                if key.startswith(prefix):
                    raise DeniedError(f"{key}: refused by a test")
                yield from real(self, key, *arguments)

            monkeypatch.setattr(type(store), name, call)

        for name in ("read", "entries", "folders"):
            guard(name)

    def test_it_breaks_no_list_and_is_no_success(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(3):
            store.put(set_id(number).prefix + MANIFEST, to_json(manifest(number, SMALL)))
        with monkeypatch.context() as patched:
            self.refuse(patched, store, set_id(1).prefix)
            found = list(list_sets(store, "app"))
            assert [one.state for one in found] == [SetState.SUCCESS, SetState.FAILED, SetState.SUCCESS]
            assert found[1].status == f"{set_id(1).prefix}{MANIFEST}: refused by a test"
            assert find_set(store, set_id(1)) == found[1]
            with pytest.raises(UnusableSetError, match=r"can't be restored: .*refused by a test"):
                whole_manifest(store, set_id(1))

    def test_it_is_not_taken_for_unfinished(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        store.put(set_id(0).prefix + "volumes/x", b"what it has is not known")
        store.put(set_id(1).prefix + FAILURE, to_json(failure(1)))
        real = type(store).read

        def read(self: Store, key: str, *arguments: object) -> Iterator[bytes]:
            if key.endswith(FAILURE):
                raise DeniedError(key)
            yield from real(self, key, *arguments)  # type: ignore[arg-type]

        with monkeypatch.context() as patched:
            patched.setattr(type(store), "read", read)
            for found in (*list_sets(store, "app"), find_set(store, set_id(0)), find_set(store, set_id(1))):
                assert found is not None
                assert found.state is SetState.FAILED

    def test_keys_that_are_refused_everything_are_told_and_not_taken_for_a_set(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.put(set_id(0).prefix + MANIFEST, to_json(manifest(0, SMALL)))
        with monkeypatch.context() as patched:
            self.refuse(patched, store, "app/")
            for call in (lambda: list(list_sets(store, "app")), lambda: find_set(store, set_id(0))):
                with pytest.raises(DeniedError):
                    call()
        with monkeypatch.context() as patched:
            never_there = set_id(99)  # of others some servers show the folder on
            self.refuse(patched, store, never_there.prefix)
            with pytest.raises(DeniedError):
                find_set(store, never_there)


def test_a_short_read_is_one_request_and_ends_where_the_object_does(
    object_store: ObjectStore, asked: Counter[str]
) -> None:
    for key, data in (("app/five", b"12345"), ("app/empty", b"")):
        object_store.put(key, data)
        for start, end in ((0, 100), (0, 5), (1, 3), (3, 100), (5, 100), (7, 9), (2, 2)):
            asked.clear()
            assert b"".join(object_store.read(key, start, end)) == data[start:end]
            assert asked.total() <= 1
    object_store.delete(["app/five", "app/empty"])
