"""The sets of a store, read from the store itself: there is no second database to lose.

Which state a set is in follows from three things only, by the table of `_state`: the documents in its folder and the marks
about it. Nothing here starts or stops an operation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from athena_backup.errors import AbsentError, FinalError
from athena_backup.manifest import FAILURE, MANIFEST, Failure, Manifest, read_failure, read_manifest
from athena_backup.names import InvalidNameError, SetId, Timestamp
from athena_backup.store import Store, read_document

_DELETING = "deleting"


class SetState(Enum):
    """What can be said of a set without looking at its parts."""

    SUCCESS = "Success"
    FAILED = "failed"
    DELETING = "deleting"
    UNFINISHED = "unfinished"
    """Neither manifest nor failure.json: it is being written, or its writer died."""


@dataclass(frozen=True)
class CatalogEntry:
    """One set as the catalog shows it."""

    set_id: SetId
    state: SetState
    status: str
    """``Success``, or in words what is wrong with it."""
    manifest: Manifest | None = None
    failure: Failure | None = None


def list_sets(store: Store, namespace: str) -> Iterator[CatalogEntry]:
    """All sets of a namespace, oldest first; other people's folders are passed over."""
    deleting = set(_deleting_marks(store, namespace))
    for folder in store.folders(f"{namespace}/"):
        try:
            set_id = SetId(namespace, Timestamp.parse(folder))
        except InvalidNameError:
            continue
        entry = _look(store, set_id, is_deleting=folder in deleting)
        if not _is_empty(store, entry):
            yield entry


def find_set(store: Store, set_id: SetId) -> CatalogEntry | None:
    """One set; None where the store has nothing of it."""
    is_deleting = store.head(_mark(set_id)) is not None
    entry = _look(store, set_id, is_deleting=is_deleting)
    return None if _is_empty(store, entry) else entry


def _is_empty(store: Store, entry: CatalogEntry) -> bool:
    """Whether nothing of the set is there: some S3 servers show the folder of what was deleted for a while (SeaweedFS, tried)."""
    return entry.state is SetState.UNFINISHED and next(store.entries(entry.set_id.prefix), None) is None


def whole_manifest(store: Store, set_id: SetId) -> Manifest:
    """The manifest of a set that can be restored; raises `AbsentError` or `FinalError` saying why there is none."""
    entry = find_set(store, set_id)
    if entry is None:
        raise AbsentError(
            f"there is no backup set {set_id}", next_step="GET /backup/list shows the sets that there are"
        )
    if entry.state is not SetState.SUCCESS or entry.manifest is None:
        raise FinalError(
            f"backup set {set_id} can't be restored: {entry.status}", next_step="choose a set with status Success"
        )
    return entry.manifest


def delete_set(store: Store, set_id: SetId) -> None:
    """Delete a set: the mark first, then the manifest, then the rest, then the mark. Killed half-way, it can be repeated.

    Raises `AbsentError` if there is no such set, and `DeniedError` before anything is changed. The caller makes sure that
    nobody writes or restores it.
    """
    if find_set(store, set_id) is None:
        raise AbsentError(
            f"there is no backup set {set_id}", next_step="GET /backup/list shows the sets that there are"
        )
    # Where this may not delete, it is refused here already: a mark that nobody could take away would take the set away.
    store.delete([f"{_mark(set_id)}-probe"])
    store.put(_mark(set_id), b"")
    store.delete([set_id.prefix + MANIFEST])
    store.delete([entry.key for entry in store.entries(set_id.prefix)])
    store.sweep(set_id.prefix)
    store.delete([_mark(set_id)])


def _look(store: Store, set_id: SetId, *, is_deleting: bool) -> CatalogEntry:
    try:
        manifest = _document(store, set_id.prefix + MANIFEST)
        failure = None if manifest is not None else _document(store, set_id.prefix + FAILURE)
        whole = None if manifest is None else read_manifest(manifest, set_id.prefix + MANIFEST)
        failed = None if failure is None else read_failure(failure, set_id.prefix + FAILURE)
        if whole is not None and whole.set_id != set_id:
            return CatalogEntry(set_id, SetState.FAILED, f"its manifest belongs to another set, {whole.set_id}")
    except FinalError as error:
        return CatalogEntry(set_id, SetState.FAILED, str(error))
    return _state(set_id, whole, failed, is_deleting=is_deleting)


def _state(set_id: SetId, manifest: Manifest | None, failure: Failure | None, *, is_deleting: bool) -> CatalogEntry:
    """The whole table: a deleting mark outranks a manifest, a manifest outranks a failure, a failure outranks nothing."""
    if is_deleting:
        return CatalogEntry(set_id, SetState.DELETING, "being deleted", failure=failure)
    if manifest is not None and manifest.state == "complete":
        return CatalogEntry(set_id, SetState.SUCCESS, "Success", manifest=manifest)
    if manifest is not None:
        return CatalogEntry(set_id, SetState.FAILED, "abandoned: its writer died before it was whole")
    if failure is not None:
        return CatalogEntry(set_id, SetState.FAILED, failure.status, failure=failure)
    return CatalogEntry(set_id, SetState.UNFINISHED, "unfinished: neither a manifest nor a failure was written")


def _document(store: Store, key: str) -> bytes | None:
    try:
        return read_document(store, key)
    except AbsentError:
        return None


def is_marked_deleting(store: Store, set_id: SetId) -> bool:
    """Whether somebody began to delete the set."""
    return store.head(_mark(set_id)) is not None


def _mark(set_id: SetId) -> str:
    return f"{set_id.namespace}/marks/{set_id.timestamp}/{_DELETING}"


def _deleting_marks(store: Store, namespace: str) -> Iterator[str]:
    for entry in store.entries(f"{namespace}/marks/"):
        timestamp, _, mark = entry.key.removeprefix(f"{namespace}/marks/").partition("/")
        if mark == _DELETING:
            yield timestamp
