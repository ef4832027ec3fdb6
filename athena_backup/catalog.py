"""The sets of a store, read from the store itself: there is no second database to lose.

Which state a set is in follows from three things only, by the table of `_state`: the documents in its folder and the marks
about it. Nothing here starts or stops an operation.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

from athena_backup.errors import AbsentError, AthenaError, DeniedError, FinalError, UnusableSetError
from athena_backup.manifest import (
    FAILURE,
    INSTRUCTIONS,
    MANIFEST,
    Failure,
    Manifest,
    ManifestHead,
    read_failure,
    read_manifest,
    read_manifest_head,
)
from athena_backup.names import InvalidNameError, SetId, Timestamp, parse_namespace
from athena_backup.store import LOOKS_AT_ONCE, Store, read_document

GLANCE_BYTES = 64 << 10
"""What a list reads of a manifest at most, in one request; `find_set` reads all of it."""
_FOLDERS_TOLD = 50
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
    """Of a successful set; in a list only if it fits into `GLANCE_BYTES`."""
    failure: Failure | None = None


def list_sets(store: Store, namespace: str) -> Iterator[CatalogEntry]:
    """All sets of a namespace, oldest first; other people's folders are passed over.

    Asks for one listing of the namespace's folders, one of its marks, and one short read per set (of a set without a
    manifest two), `LOOKS_AT_ONCE` of them at once. Of a manifest beyond `GLANCE_BYTES` only the head is read and checked.
    """
    deleting = set(_deleting_marks(store, namespace))

    def look(set_id: SetId) -> CatalogEntry | None:
        try:
            return _look(store, set_id, _glance, is_deleting=str(set_id.timestamp) in deleting)
        except DeniedError as error:
            # It is there, as its folder was listed, and one that is archived or root's keeps nobody from the others.
            return CatalogEntry(set_id, SetState.FAILED, str(error))

    with contextlib.closing(_side_by_side(look, _set_ids(store, namespace))) as entries:
        yield from (entry for entry in entries if entry is not None)


def nothing_of(store: Store, namespace: str) -> str:
    """What to say of a namespace without sets: that there is none, and the folders at the store's top, of which others are some.

    What is in them is not looked at: in a bucket of many users that may be any number of objects.
    """
    others: list[str] = []
    # They are only told beside: our permissions may end at our own folder.
    with contextlib.suppress(AthenaError):
        for folder in itertools.islice(store.folders(""), _FOLDERS_TOLD):
            with contextlib.suppress(InvalidNameError):
                others.append(parse_namespace(folder))
    told = f"; its folders, each of which may be a namespace: {', '.join(others)}" if others else ""
    return f"no set of namespace {namespace} in this store{told}"


def _set_ids(store: Store, namespace: str) -> Iterator[SetId]:
    for folder in store.folders(f"{namespace}/"):
        with contextlib.suppress(InvalidNameError):
            yield SetId(namespace, Timestamp.parse(folder))


def _side_by_side(
    look: Callable[[SetId], CatalogEntry | None], set_ids: Iterable[SetId]
) -> Generator[CatalogEntry | None, None, None]:
    """The looks at all sets in their order, some of them taken ahead of their turn."""
    pool = ThreadPoolExecutor(LOOKS_AT_ONCE, thread_name_prefix="catalog")
    ahead: deque[Future[CatalogEntry | None]] = deque()
    try:
        for set_id in set_ids:
            ahead.append(pool.submit(look, set_id))
            if len(ahead) > 4 * LOOKS_AT_ONCE:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def find_set(store: Store, set_id: SetId) -> CatalogEntry | None:
    """One set; None where the store has nothing of it."""
    try:
        return _look(store, set_id, _whole, is_deleting=store.head(_mark(set_id)) is not None)
    except DeniedError as error:
        # Keys that may not list are refused what is not there, too (S3's manual, GetObject): that says nothing about a set.
        if set_id not in _set_ids(store, set_id.namespace):
            raise
        return CatalogEntry(set_id, SetState.FAILED, str(error))


def whole_manifest(store: Store, set_id: SetId) -> Manifest:
    """The manifest of a set that can be restored; raises `AbsentError` or `UnusableSetError` saying why there is none."""
    entry = find_set(store, set_id)
    if entry is None:
        raise _absent(set_id)
    if entry.state is not SetState.SUCCESS or entry.manifest is None:
        raise UnusableSetError(
            f"backup set {set_id} can't be restored: {entry.status}", next_step="choose a set with status Success"
        )
    return entry.manifest


def delete_set(store: Store, set_id: SetId) -> None:
    """Delete a set: RESTORE.md first, the mark, the manifest, the rest, the mark. Killed half-way, it can be repeated.

    What killed writers left of a set that shows nothing else is swept. Raises `AbsentError` if there is neither, and the
    store's refusal to delete while the set can still be restored. The caller makes sure that nobody writes or restores it.
    """
    entry = find_set(store, set_id)
    if entry is None:
        # Their uploads are in no listing, and may be large.
        if store.sweep(set_id.prefix) == 0:
            raise _absent(set_id)
        return
    _delete_instructions(store, set_id, entry.manifest)
    store.put(_mark(set_id), b"")
    store.delete([set_id.prefix + MANIFEST])
    store.delete([one.key for one in store.entries(set_id.prefix)])
    store.sweep(set_id.prefix)
    store.delete([_mark(set_id)])


def _delete_instructions(store: Store, set_id: SetId, manifest: Manifest | None) -> None:
    """Delete RESTORE.md, which no program needs: a store that keeps what it has refuses it here, while the set is whole.

    Behind the mark a refusal would leave all of the set there, never to be restored. What a store lacks it deletes gladly, so
    nothing but an object that is as old as the manifest tells (a bucket's retention, a disk that is only appended to).
    """
    key = set_id.prefix + INSTRUCTIONS
    if manifest is not None and store.head(key) is None:
        # Somebody took it, or was killed between this and the mark. A new one is kept for no less long.
        from athena_backup.instructions import instructions  # with all that it needs, a list would begin later

        store.put(key, instructions(manifest).encode())
    store.delete([key])


def _absent(set_id: SetId) -> AbsentError:
    return AbsentError(
        f"there is no backup set {set_id}",
        next_step=f"`athena-backup list --namespace {set_id.namespace}` shows the sets that there are, and GET /backup/list"
        " those of the service's own namespace",
    )


def _look(
    store: Store, set_id: SetId, read: Callable[[Store, str], ManifestHead | None], *, is_deleting: bool
) -> CatalogEntry | None:
    """What the set's documents say; None where the store has nothing of it. Raises `DeniedError` and `UnavailableError`."""
    try:
        manifest = read(store, set_id.prefix + MANIFEST)
        failure = None if manifest is not None else _document(store, set_id.prefix + FAILURE)
        failed = None if failure is None else read_failure(failure, set_id.prefix + FAILURE)
        if manifest is not None and manifest.set_id != set_id:
            return CatalogEntry(set_id, SetState.FAILED, f"its manifest belongs to another set, {manifest.set_id}")
    except DeniedError:
        raise  # what it says depends on whether the set is known to be there
    except FinalError as error:
        return CatalogEntry(set_id, SetState.FAILED, str(error))
    entry = _state(set_id, manifest, failed, is_deleting=is_deleting)
    # A server that is a file system beneath shows a folder on after its last object was deleted (SeaweedFS).
    if entry.state is SetState.UNFINISHED and next(store.entries(set_id.prefix), None) is None:
        return None
    return entry


def _whole(store: Store, key: str) -> Manifest | None:
    """The manifest, read and checked to its end; None where there is none."""
    document = _document(store, key)
    return None if document is None else read_manifest(document, key)


def _glance(store: Store, key: str) -> ManifestHead | None:
    """A look at a manifest by one short read: the whole of a small one, else its head; None where there is none."""
    try:
        beginning = b"".join(store.read(key, 0, GLANCE_BYTES))
    except AbsentError:
        return None
    if len(beginning) < GLANCE_BYTES:
        return read_manifest(beginning, key)
    # Somebody else's program may order the members otherwise.
    return read_manifest_head(beginning, key) or read_manifest(read_document(store, key), key)


def _state(set_id: SetId, manifest: ManifestHead | None, failure: Failure | None, *, is_deleting: bool) -> CatalogEntry:
    """The whole table: a deleting mark outranks a manifest, a manifest outranks a failure, a failure outranks nothing."""
    if is_deleting:
        return CatalogEntry(set_id, SetState.DELETING, "being deleted", failure=failure)
    if manifest is not None and manifest.state == "complete":
        whole = manifest if isinstance(manifest, Manifest) else None
        return CatalogEntry(set_id, SetState.SUCCESS, "Success", manifest=whole)
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
