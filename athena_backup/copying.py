"""A set copied from one store into another, as it is: the second copy of "3-2-1", from which a restore works unchanged.

Every object keeps its key, so the copy's manifest is the original's, byte for byte, its ``proved_by`` included, which
speaks of the first store. What makes the copy whole is checked here: each part's SHA-256 as its bytes pass, and every size
once more before the manifest is put, last. A copy that was broken off is completed by copying again.

One part at a time: reading and writing share out the buffers of both stores, and two streams more would double them.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from athena_backup.backup import put_once
from athena_backup.catalog import is_marked_deleting, whole_manifest
from athena_backup.errors import AbsentError, AthenaError, DamagedError, FinalError
from athena_backup.instructions import instructions
from athena_backup.manifest import (
    COMPONENT,
    FAILURE,
    INSTRUCTIONS,
    MANIFEST,
    Component,
    Manifest,
    Part,
    component_folder,
    read_component,
    read_manifest,
)
from athena_backup.names import SetId, new_attempt
from athena_backup.operation import Operation
from athena_backup.pipeline import read_back, watched
from athena_backup.store import Store, StoreLocation, UnsettledError, read_document

_GLOBALS = "globals/"
_STEP = "copying"
logger = logging.getLogger("athena_backup.copying")


@dataclass(frozen=True)
class Copied:
    """What a copy did."""

    parts: int
    size_bytes: int
    sent_bytes: int
    """Without the parts that an earlier copy had brought there already."""


def copy_set(source: Store, target: Store, set_id: SetId, operation: Operation) -> Copied:
    """Copy a successful set; one that is copied already is looked through and completed.

    Raises `AbsentError` and `FinalError` for a set that can't be restored from ``source``, `FinalError` for another set of
    the same name in ``target`` (nothing is written then), `DamagedError` for bytes that are not the manifest's, and the
    stores' errors. Whoever deletes sets keeps off both places meanwhile.
    """
    try:
        return _copy_set(source, target, set_id, operation)
    except AthenaError as error:
        error.step = error.step or _STEP
        raise


def _are_one(one: StoreLocation, other: StoreLocation) -> bool:
    """Whether two locations are one place, however they are written."""
    if one.type == other.type == "local":
        with contextlib.suppress(OSError):  # one that is not there yet is no other
            return os.path.samefile(one.place, other.place)
    if one.endpoint:
        # Of a server of one's own: most take any region for their own.
        one, other = replace(one, region=""), replace(other, region="")
    return one == other


def _copy_set(source: Store, target: Store, set_id: SetId, operation: Operation) -> Copied:
    if _are_one(target.location, source.location):
        raise FinalError(
            f"{target.location.place} is the store that the set is in", next_step="name another store for the copy"
        )
    manifest = whole_manifest(source, set_id)
    # Its very bytes: a newer minor version may have members that this one would drop.
    document = read_document(source, set_id.prefix + MANIFEST)
    if read_manifest(document, set_id.prefix + MANIFEST) != manifest:
        raise DamagedError(f"the manifest of {set_id} changed while it was read")
    documents = _documents(source, manifest)
    if _refuse_another_set(target, manifest, document, documents):
        _refuse_another_name(source, target, set_id)
    parts = [part for component in manifest.components for part in component.parts]
    sent_bytes = 0
    for component in manifest.components:
        operation.expect(component.name, sum(part.size_bytes for part in component.parts))
    _sweep_killed_copies(target, manifest)
    for component in manifest.components:
        for part in component.parts:
            operation.check()
            sent_bytes += _copy_part(source, target, component.name, part, operation)
    for key, data in documents.items():
        operation.check()
        put_once(target, key, data)
    _look_at_all(target, manifest, documents)
    operation.check()
    put_once(target, set_id.prefix + MANIFEST, document)
    return Copied(len(parts), sum(part.size_bytes for part in parts), sent_bytes)


def _documents(source: Store, manifest: Manifest) -> dict[str, bytes]:
    """The set's small objects beside parts and manifest, by key; those of failed attempts are no part of the set."""
    found = {}
    for component in manifest.components:
        key = component_folder(manifest.set_id, component.kind, component.name, component.attempt) + COMPONENT
        found[key] = read_document(source, key)
        _check_component(component, found[key], key)
    prefix = manifest.set_id.prefix
    for entry in source.entries(prefix + _GLOBALS):
        found[entry.key] = read_document(source, entry.key)
    try:
        found[prefix + INSTRUCTIONS] = read_document(source, prefix + INSTRUCTIONS)
    except AbsentError:
        # A deletion that was killed or refused at its beginning took it; the set is whole, and people may need it there.
        found[prefix + INSTRUCTIONS] = instructions(manifest).encode()
    return found


def _check_component(component: Component, document: bytes, key: str) -> None:
    if read_component(document, key) != component:
        raise DamagedError(f"{key} is not what the manifest says of it", next_step="copy another set")


def _refuse_another_name(source: Store, target: Store, set_id: SetId) -> None:
    """Raise `FinalError` if what is put into the target is seen in the source: one place, by two names of a server's.

    Two names can't be compared as `_are_one` does. Of a target that has the whole set already this tells a copy from the set itself.
    """
    probe = f"{set_id.namespace}/operations/probe-{new_attempt()}"
    target.put(probe, b"")
    try:
        is_one = source.head(probe) is not None
    finally:
        with contextlib.suppress(AthenaError):  # keys that may not delete are enough for copies
            target.delete([probe])
    if is_one:
        raise FinalError(
            f"{target.location.place} is the store that the set is in, by another name",
            next_step="name another store for the copy",
        )


def _refuse_another_set(target: Store, manifest: Manifest, document: bytes, documents: dict[str, bytes]) -> bool:
    """Raise `FinalError` if the target has anything under the set's name that no copy of this set has put there.

    Returns whether it has the set's manifest, and so the whole set.
    """
    set_id = manifest.set_id
    where = f"{target.location.place} has another set {set_id}"
    advice = "delete it there, or copy into another store"
    if is_marked_deleting(target, set_id):
        raise FinalError(
            f"{set_id} is being deleted in {target.location.place}", next_step="delete it there to the end"
        )
    is_whole = True
    try:
        if read_document(target, set_id.prefix + MANIFEST) != document:
            raise FinalError(f"{where}: its manifest differs", next_step=advice)
    except AbsentError:
        is_whole = False
    ours = {part.key for component in manifest.components for part in component.parts}
    ours |= {*documents, set_id.prefix + MANIFEST}
    for entry in target.entries(set_id.prefix):
        if entry.key not in ours:
            what = "which failed" if entry.key == set_id.prefix + FAILURE else f"with {entry.key}"
            raise FinalError(f"{where}, {what}", next_step=advice)
    return is_whole


def _sweep_killed_copies(target: Store, manifest: Manifest) -> None:
    """Remove what a copy of this set that was killed left invisible in the target; no copy depends on it.

    In the folders of the set's own attempts alone: a service whose own store the target is may be writing a set of this
    name at this moment.
    """
    for one in manifest.components:
        try:
            target.sweep(component_folder(manifest.set_id, one.kind, one.name, one.attempt))
        except AthenaError as error:
            logger.warning("what a killed copy may have left of %s was not looked for: %s", one.name, error)
            return


def _copy_part(source: Store, target: Store, component: str, part: Part, operation: Operation) -> int:
    """Copy one part unless it stands in the target already; returns how many bytes were sent."""
    standing = target.head(part.key)
    if standing is not None:
        if standing.size_bytes != part.size_bytes or _hash(target, component, part.key, operation) != part.sha256:
            raise DamagedError(
                f"{part.key} in {target.location.place} is not the set's", next_step="delete the set there, copy again"
            )
        return 0
    try:
        watched(lambda: target.write(part.key, _checked(source, component, part, operation)), operation)
        is_proven = target.proof != "read-back"
    except UnsettledError:
        is_proven = False
    if not is_proven:
        read_back(target, part.key, part.sha256, operation)
    return part.size_bytes


def _checked(source: Store, component: str, part: Part, operation: Operation) -> Iterator[bytes]:
    """The bytes of a part; raises `DamagedError` at its end, so that it is never stored, unless they are the manifest's."""
    digest = hashlib.sha256()
    size_bytes = 0
    for chunk in source.read(part.key):
        operation.check()
        digest.update(chunk)
        size_bytes += len(chunk)
        operation.advance(component, len(chunk))
        if chunk:
            yield chunk
    if size_bytes != part.size_bytes or digest.hexdigest() != part.sha256:
        raise DamagedError(
            f"{part.key} in {source.location.place} is damaged: its size or SHA-256 differs from the manifest's",
            next_step="this set can't be restored wholly: take another backup, and find out what changed it",
        )


def _hash(store: Store, component: str, key: str, operation: Operation) -> str:
    digest = hashlib.sha256()
    for chunk in store.read(key):
        operation.check()
        digest.update(chunk)
        operation.advance(component, len(chunk))
    return digest.hexdigest()


def _look_at_all(target: Store, manifest: Manifest, documents: dict[str, bytes]) -> None:
    """Raise `FinalError` unless everything that the manifest names stands in the target, right before it is put."""
    wanted = {part.key: part.size_bytes for component in manifest.components for part in component.parts}
    wanted |= {key: len(data) for key, data in documents.items()}
    found = {entry.key: entry.size_bytes for entry in target.entries(manifest.set_id.prefix)}
    missing = [key for key, size_bytes in wanted.items() if found.get(key) != size_bytes]
    if missing or is_marked_deleting(target, manifest.set_id):
        what = f"{missing[0]} is not whole" if missing else "it is marked as being deleted"
        raise FinalError(
            f"somebody deletes {manifest.set_id} in {target.location.place}: {what}", next_step="copy it again"
        )
