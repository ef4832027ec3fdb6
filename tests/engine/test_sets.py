"""How a set is closed, listed and deleted: what is listed as Success is whole, anything less is a failed set."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from athena_backup import backup
from athena_backup.backup import (
    Expected,
    OutcomeUnknownError,
    close_set,
    complete_attempt,
    put_component,
    put_failed_component,
    put_once,
)
from athena_backup.catalog import SetState, delete_set, find_set, list_sets, whole_manifest
from athena_backup.errors import AbsentError, DeniedError, FinalError, UnavailableError
from athena_backup.manifest import (
    FAILURE,
    INSTRUCTIONS,
    MANIFEST,
    Component,
    Failure,
    Manifest,
    Server,
    Stream,
    component_folder,
    read_manifest,
    to_json,
)
from athena_backup.names import SetId, Timestamp, new_attempt
from athena_backup.operation import Operation
from athena_backup.pipeline import Source, write_stream
from athena_backup.store import Entry, read_document
from athena_backup.store.local import LocalStore

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
SET = SetId("app", Timestamp.parse("2026-11-23t12-00-00"))
GITSERVER = Expected("gitserver", "volume")
EDWEB = Expected("edweb", "volume")


def written(
    store: LocalStore, expected: Expected = GITSERVER, *, server: Server | None = None, run_id: str = "run"
) -> Component:
    """A component with one real part and its document, as a backup leaves it."""
    attempt = new_attempt()
    folder = component_folder(SET, expected.kind, expected.name, attempt)
    source = Source(expected.name, lambda operation: iter([b"content of " + expected.name.encode()]))
    parts = write_stream(source, store, lambda number: f"{folder}0000.tar.zst.{number:04}", Operation())
    component = Component(
        name=expected.name,
        kind=expected.kind,
        attempt=attempt,
        run_id=run_id,
        state="complete",
        began=NOW,
        ended=datetime.now(UTC),
        streams=(Stream(name="0000.tar.zst", parts=parts),),
        server=server,
    )
    put_component(store, SET, component)
    return component


def close(store: LocalStore, *expected: Expected, **options: bool) -> Manifest | Failure:
    return close_set(store, SET, expected, [], run_id="run", began=NOW, **options)


def test_a_set_whose_components_are_all_there_gets_a_manifest_and_is_listed_as_success(local_store: LocalStore) -> None:
    components = [written(local_store, GITSERVER), written(local_store, EDWEB)]
    outcome = close(local_store, GITSERVER, EDWEB)
    assert isinstance(outcome, Manifest)
    assert outcome.components == tuple(components)
    assert [(one.set_id, one.status) for one in list_sets(local_store, "app")] == [(SET, "Success")]
    assert whole_manifest(local_store, SET) == outcome
    assert b"zstd -dc" in read_document(local_store, SET.prefix + "RESTORE.md")


def test_a_component_that_was_never_written_fails_the_set_and_is_named(local_store: LocalStore) -> None:
    written(local_store, GITSERVER)
    outcome = close(local_store, GITSERVER, EDWEB)
    assert isinstance(outcome, Failure)
    assert "edweb" in outcome.status
    assert "gitserver" not in outcome.status
    assert local_store.head(SET.prefix + MANIFEST) is None


def test_a_part_that_is_gone_or_short_fails_the_set(local_store: LocalStore) -> None:
    component = written(local_store)
    local_store.delete([component.parts[0].key])
    outcome = close(local_store, GITSERVER)
    assert isinstance(outcome, Failure)
    assert component.parts[0].key in outcome.status


def test_a_component_without_parts_or_with_those_of_another_set_fails_the_set(local_store: LocalStore) -> None:
    component = written(local_store)
    key = component_folder(SET, "volume", "gitserver", component.attempt) + "component.json"
    foreign = component.parts[0].model_copy(update={"key": "app/2020-01-01t00-00-00/x"})
    local_store.put(foreign.key, b"x")
    for parts, cause in (((), "the store lacks every part"), ((foreign,), "outside of its folder")):
        stream = component.streams[0].model_copy(update={"parts": parts})
        local_store.put(key, to_json(component.model_copy(update={"streams": (stream,)})))
        outcome = close(local_store, GITSERVER)
        assert isinstance(outcome, Failure)
        assert cause in outcome.status


def test_a_retry_that_succeeds_closes_the_set_of_an_earlier_failure(local_store: LocalStore) -> None:
    fault = FinalError("the disk was full").fault(component="gitserver", step="archiving")
    put_failed_component(local_store, SET, GITSERVER, "run", NOW, fault)
    first = close(local_store, GITSERVER)
    assert isinstance(first, Failure)
    assert "the disk was full" in first.status
    written(local_store)
    assert isinstance(close(local_store, GITSERVER), Manifest)
    assert [one.status for one in list_sets(local_store, "app")] == ["Success"]


def test_the_status_names_every_failed_component_in_the_order_of_time(local_store: LocalStore) -> None:
    later = FinalError("no space").fault(component="asp", step="dumping", at=NOW + timedelta(seconds=5))
    earlier = FinalError("not mounted").fault(component="edweb", step="archiving", at=NOW)
    outcome = close_set(
        local_store, SET, [Expected("asp", "database"), EDWEB], [later, earlier], run_id="run", began=NOW
    )
    assert isinstance(outcome, Failure)
    assert outcome.status == "edweb: error archiving: not mounted; asp: error dumping: no space"


def test_a_fault_keeps_a_set_from_success_even_if_every_part_is_there(local_store: LocalStore) -> None:
    written(local_store)
    fault = FinalError("a holder was lost").fault(component="gitserver", step="reading")
    assert isinstance(close_set(local_store, SET, [GITSERVER], [fault], run_id="run", began=NOW), Failure)


def server(number: int, second: int) -> Server:
    return Server(
        number=number, host="h", port=1, version=180000, system_identifier="1", in_recovery=False,
        consistent_at=NOW + timedelta(seconds=second), exact=True, spread_seconds=0,
    )  # fmt: skip


def test_databases_that_were_read_under_different_cuts_are_no_set(local_store: LocalStore) -> None:
    asp, gogs = Expected("asp", "database"), Expected("gogs", "database")
    written(local_store, asp, server=server(0, 0))
    written(local_store, gogs, server=server(0, 1))
    outcome = close(local_store, asp, gogs)
    assert isinstance(outcome, Failure)
    assert "different instants" in outcome.status


def test_the_manifest_holds_the_time_between_the_instants_of_several_servers(local_store: LocalStore) -> None:
    asp, gogs = Expected("asp", "database"), Expected("gogs", "database")
    written(local_store, asp, server=server(0, 0))
    written(local_store, gogs, server=server(1, 3))
    outcome = close(local_store, asp, gogs)
    assert isinstance(outcome, Manifest)
    assert outcome.spread_seconds == 3


def test_nothing_configured_is_a_failed_set_and_not_an_empty_success(local_store: LocalStore) -> None:
    outcome = close(local_store)
    assert isinstance(outcome, Failure)
    assert "ATHENA_DATABASES" in outcome.status


def test_a_cancelled_backup_says_so(local_store: LocalStore) -> None:
    written(local_store)
    close(local_store, GITSERVER, cancelled=True)
    assert [one.status for one in list_sets(local_store, "app")] == ["Cancelled"]


def test_closing_twice_does_no_harm(local_store: LocalStore) -> None:
    written(local_store)
    assert close(local_store, GITSERVER) == close(local_store, GITSERVER)
    local_store.put(SET.prefix + FAILURE, b"{}")
    assert [one.status for one in list_sets(local_store, "app")] == ["Success"]


def test_of_several_complete_attempts_the_newest_whole_one_counts(local_store: LocalStore) -> None:
    first, second = written(local_store), written(local_store)
    assert complete_attempt(local_store, SET, GITSERVER, "run") == second
    local_store.delete([second.parts[0].key])
    assert complete_attempt(local_store, SET, GITSERVER, "run") == first


def test_what_another_run_wrote_is_no_part_of_a_set(local_store: LocalStore) -> None:
    """As of a standby's service with the same namespace and store: its state is not this one's."""
    own = written(local_store)
    written(local_store, run_id="another")
    written(local_store, EDWEB, run_id="another")
    outcome = close(local_store, GITSERVER, EDWEB)
    assert isinstance(outcome, Failure)
    assert "edweb" in outcome.status
    outcome = close(local_store, GITSERVER)
    assert isinstance(outcome, Manifest)
    assert outcome.components == (own,)


def test_the_manifest_of_another_run_is_not_taken_for_one_s_own(local_store: LocalStore) -> None:
    written(local_store)
    close(local_store, GITSERVER)
    with pytest.raises(FinalError, match="another run has written the set"):
        close_set(local_store, SET, [GITSERVER], [], run_id="another", began=NOW)
    assert [one.status for one in list_sets(local_store, "app")] == ["Success"]


class LosingAnswers(LocalStore):
    """A store whose puts succeed, or not, and whose answer is lost: what a cut connection looks like."""

    def __init__(self, place: str, stored: Iterator[bool]) -> None:
        super().__init__(place)
        self._stored = stored

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        is_stored = next(self._stored, None)
        if is_stored is None:
            return super().put(key, data, if_absent=if_absent)
        if is_stored:
            super().put(key, data, if_absent=if_absent)
        raise UnavailableError("connection reset")


class KilledAtTheManifest(LocalStore):
    """A store whose user dies in the middle of a deletion, once the set is marked."""

    def delete(self, keys: Iterable[str]) -> None:
        found = list(keys)
        if SET.prefix + MANIFEST in found:
            raise SystemExit
        super().delete(found)


class DeletingMeanwhile(LocalStore):
    """A store on which somebody deletes the set while its manifest is on its way."""

    is_half_done = False

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        if key == SET.prefix + MANIFEST:
            other = KilledAtTheManifest if self.is_half_done else LocalStore
            with contextlib.suppress(SystemExit):
                delete_set(other(self.location.place), SET)
        return super().put(key, data, if_absent=if_absent)


class GoneAfterTheManifest(LocalStore):
    """A store that is away as soon as the manifest stands."""

    is_gone = False

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        stored = super().put(key, data, if_absent=if_absent)
        self.is_gone = key == SET.prefix + MANIFEST
        return stored

    def head(self, key: str) -> Entry | None:
        if self.is_gone:
            raise UnavailableError("connection reset")
        return super().head(key)


def test_a_store_that_goes_away_once_the_manifest_stands_does_not_make_the_backup_a_failure(
    local_store: LocalStore,
) -> None:
    written(local_store)
    assert isinstance(close(GoneAfterTheManifest(local_store.location.place), GITSERVER), Manifest)
    assert [one.status for one in list_sets(local_store, "app")] == ["Success"]


def test_a_manifest_that_comes_after_the_deletion_of_its_set_is_withdrawn(local_store: LocalStore) -> None:
    written(local_store)
    with pytest.raises(FinalError, match="deleted the set while it was closed"):
        close(DeletingMeanwhile(local_store.location.place), GITSERVER)
    assert list(local_store.entries(SET.prefix)) == []
    assert list(list_sets(local_store, "app")) == []


def test_a_manifest_that_comes_while_its_set_is_deleted_is_withdrawn(local_store: LocalStore) -> None:
    written(local_store)
    store = DeletingMeanwhile(local_store.location.place)
    store.is_half_done = True
    with pytest.raises(FinalError, match="deleted the set while it was closed"):
        close(store, GITSERVER)
    assert local_store.head(SET.prefix + MANIFEST) is None
    delete_set(local_store, SET)
    assert list(list_sets(local_store, "app")) == []


@pytest.mark.parametrize("stored", [[True], [False], [False, True], [True, True]])
def test_a_lost_answer_to_a_put_is_settled_by_reading(
    local_store: LocalStore, stored: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup.time, "sleep", lambda seconds: None)
    store = LosingAnswers(local_store.location.place, iter(stored))
    put_once(store, "app/x/manifest.json", b"document")
    assert read_document(local_store, "app/x/manifest.json") == b"document"


def test_a_document_that_another_process_wrote_is_not_taken_for_ours(local_store: LocalStore) -> None:
    local_store.put("app/x/manifest.json", b"theirs")
    with pytest.raises(FinalError, match="another process"):
        put_once(local_store, "app/x/manifest.json", b"ours")


class RefusingWhatIsNotThere(LocalStore):
    """A store that refuses to create what it does not have, so many times: S3's answer to one of two puts that meet."""

    refusals = 1

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        if if_absent and self.refusals:
            self.refusals -= 1
            return False
        return super().put(key, data, if_absent=if_absent)


def test_a_put_that_is_refused_although_nothing_stands_is_tried_again(
    local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup.time, "sleep", lambda seconds: None)
    put_once(RefusingWhatIsNotThere(local_store.location.place), "app/x/manifest.json", b"document")
    assert read_document(local_store, "app/x/manifest.json") == b"document"


def test_a_put_that_is_refused_for_ever_ends_as_unknown(
    local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "SETTLE_SECONDS", 0)
    with pytest.raises(OutcomeUnknownError, match=r"refuses to create app/x/manifest\.json"):
        put_once(RefusingWhatIsNotThere(local_store.location.place), "app/x/manifest.json", b"document")


class WithoutBucket(LocalStore):
    """A store whose bucket is missing, told without a word of it."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        raise AbsentError(key)


def test_a_put_into_what_is_not_there_is_told_at_once(local_store: LocalStore) -> None:
    with pytest.raises(AbsentError):
        put_once(WithoutBucket(local_store.location.place), "app/x/manifest.json", b"document")


class KeepingWhatItHas(LocalStore):
    """A store under a retention policy, or on a disk that is only appended to: it deletes what it lacks and nothing else."""

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            if self.head(key) is not None:
                raise DeniedError(f"{key} is kept")


class TestCatalog:
    """What the listing shows, and what it never touches."""

    def test_sets_are_listed_oldest_first_failed_ones_too(self, local_store: LocalStore) -> None:
        for text in ("2026-11-23t12-00-00", "2026-11-22t12-00-00", "2026-11-24t12-00-00"):
            fault = FinalError(f"because of {text}").fault(step="testing")
            close_set(local_store, SetId("app", Timestamp.parse(text)), [], [fault], run_id="run", began=NOW)
        found = list(list_sets(local_store, "app"))
        assert [str(one.set_id.timestamp)[:10] for one in found] == ["2026-11-22", "2026-11-23", "2026-11-24"]
        assert all(one.state is SetState.FAILED for one in found)

    def test_objects_of_others_beside_the_sets_are_never_read_as_sets(self, local_store: LocalStore) -> None:
        for key in ("app/audit/2026/log", "app/operations/x", "app/2026-99-99t00-00-00/manifest.json", "app/notes"):
            local_store.put(key, b"not ours")
        assert list(list_sets(local_store, "app")) == []

    def test_a_damaged_manifest_is_no_success(self, local_store: LocalStore) -> None:
        written(local_store)
        close(local_store, GITSERVER)
        local_store.put(SET.prefix + MANIFEST, b'{"schema_version": "2.0", "state": "complete"}')
        (entry,) = list_sets(local_store, "app")
        assert entry.state is SetState.FAILED
        assert "damaged" in entry.status

    @pytest.mark.parametrize(
        ("where", "value"),
        [
            (("timestamp",), "nonsense"),
            (("namespace",), "../x"),
            (("schema_version",), "9" * 5_000 + ".0"),
            (("began",), "2026-11-23T12:00:00"),
            (("components", 0, "streams", 0, "parts", 0, "key"), "../../etc/shadow"),
            (("components", 0, "streams", 0, "parts", 0, "key"), "app/2020-01-01t00-00-00/volumes/x/0000"),
            (("components", 0, "streams"), []),
            (("components", 0, "state"), "failed"),
            (("components", 1, "name"), "gitserver"),
        ],
    )
    def test_a_manifest_that_cannot_be_true_is_no_success_and_breaks_no_list(
        self, local_store: LocalStore, where: tuple[str | int, ...], value: object
    ) -> None:
        written(local_store, GITSERVER)
        written(local_store, EDWEB)
        close(local_store, GITSERVER, EDWEB)
        document = json.loads(read_document(local_store, SET.prefix + MANIFEST))
        place = document
        for step in where[:-1]:
            place = place[step]
        place[where[-1]] = value
        local_store.put(SET.prefix + MANIFEST, json.dumps(document).encode())
        [entry] = list_sets(local_store, "app")
        assert entry.state is SetState.FAILED
        assert "is not a document of ours" in entry.status

    def test_a_failure_with_instants_that_cannot_be_compared_breaks_no_list(self, local_store: LocalStore) -> None:
        faults = [FinalError("x").fault(at=NOW), FinalError("y").fault(at=NOW)]
        document = json.loads(to_json(close_set(local_store, SET, [], faults, run_id="run", began=NOW)))
        document["faults"][0]["at"] = "2026-11-23T12:00:00"
        local_store.put(SET.prefix + FAILURE, json.dumps(document).encode())
        [entry] = list_sets(local_store, "app")
        assert entry.state is SetState.FAILED

    def test_a_manifest_that_was_copied_under_another_timestamp_is_no_success(self, local_store: LocalStore) -> None:
        written(local_store)
        close(local_store, GITSERVER)
        local_store.put("app/2026-11-24t12-00-00/manifest.json", read_document(local_store, SET.prefix + MANIFEST))
        assert [one.state for one in list_sets(local_store, "app")] == [SetState.SUCCESS, SetState.FAILED]

    def test_a_set_without_manifest_and_failure_is_unfinished(self, local_store: LocalStore) -> None:
        written(local_store)
        entry = find_set(local_store, SET)
        assert entry is not None
        assert entry.state is SetState.UNFINISHED
        with pytest.raises(FinalError, match="can't be restored"):
            whole_manifest(local_store, SET)

    def test_a_set_that_is_not_there_is_absent(self, local_store: LocalStore) -> None:
        assert find_set(local_store, SET) is None
        for call in (whole_manifest, delete_set):
            with pytest.raises(AbsentError):
                call(local_store, SET)

    def test_deleting_takes_the_whole_set_and_nothing_else(self, local_store: LocalStore) -> None:
        written(local_store)
        close(local_store, GITSERVER)
        local_store.put("app/audit/log", b"")
        delete_set(local_store, SET)
        assert [entry.key for entry in local_store.entries("")] == ["app/audit/log"]

    def test_a_set_whose_deletion_was_killed_is_no_success_and_can_be_deleted_again(
        self, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written(local_store)
        close(local_store, GITSERVER)

        def killed(store: LocalStore, keys: Iterable[str]) -> None:
            # Before it is RESTORE.md, by which is seen whether anything may be deleted.
            if SET.prefix + MANIFEST in keys:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(LocalStore, "delete", killed)
            with pytest.raises(KeyboardInterrupt):
                delete_set(local_store, SET)
        (entry,) = list_sets(local_store, "app")
        assert entry.state is SetState.DELETING
        with pytest.raises(FinalError):
            whole_manifest(local_store, SET)
        delete_set(local_store, SET)
        assert list(local_store.entries("")) == []

    @pytest.mark.parametrize("has_instructions", [True, False])
    def test_a_store_that_keeps_what_it_has_keeps_the_set_whole(
        self, local_store: LocalStore, *, has_instructions: bool
    ) -> None:
        written(local_store)
        outcome = close(local_store, GITSERVER)
        before = [entry.key for entry in local_store.entries("")]
        if not has_instructions:
            local_store.delete([SET.prefix + INSTRUCTIONS])
        with pytest.raises(DeniedError, match=r"RESTORE\.md is kept"):
            delete_set(KeepingWhatItHas(local_store.location.place), SET)
        assert [entry.key for entry in local_store.entries("")] == before
        assert [one.status for one in list_sets(local_store, "app")] == ["Success"]
        assert whole_manifest(local_store, SET) == outcome

    def test_a_deletion_that_was_killed_before_its_mark_leaves_a_set_that_can_be_restored_and_deleted(
        self, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written(local_store)
        outcome = close(local_store, GITSERVER)

        def killed(store: LocalStore, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(LocalStore, "put", killed)
            with pytest.raises(KeyboardInterrupt):
                delete_set(local_store, SET)
        assert local_store.head(SET.prefix + INSTRUCTIONS) is None
        assert [one.status for one in list_sets(local_store, "app")] == ["Success"]
        assert whole_manifest(local_store, SET) == outcome
        delete_set(local_store, SET)
        assert list(local_store.entries("")) == []

    def test_what_killed_writers_left_of_a_set_that_shows_nothing_else_is_deleted(
        self, local_store: LocalStore
    ) -> None:
        left = (
            Path(local_store.location.place) / SET.prefix / "volumes" / "gitserver" / "0123456789ab" / ".athena-tmp-1"
        )
        left.parent.mkdir(parents=True)
        left.write_bytes(b"gigabytes")
        assert find_set(local_store, SET) is None
        delete_set(local_store, SET)
        assert not left.exists()
        with pytest.raises(AbsentError):
            delete_set(local_store, SET)


class TestSchema:
    """What a reader may rely on."""

    def test_a_newer_major_version_is_refused_and_a_newer_minor_one_read(self, local_store: LocalStore) -> None:
        written(local_store)
        manifest = close(local_store, GITSERVER)
        assert isinstance(manifest, Manifest)
        newer = manifest.model_copy(update={"schema_version": "3.0"})
        with pytest.raises(FinalError, match="newer version of athena-backup"):
            read_manifest(to_json(newer), "manifest.json")
        extended = to_json(manifest.model_copy(update={"schema_version": "2.9"})).replace(b"{", b'{"future": 1, ', 1)
        assert read_manifest(extended, "manifest.json").components == manifest.components
