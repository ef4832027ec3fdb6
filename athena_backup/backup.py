"""What makes components a set: their documents, the instructions beside them, and the one path on which a set is closed.

First run, retry and recovery all end in `close_set`: it reads every component.json back, looks at every part, and writes
either manifest.json or failure.json. Nothing about a set is believed because somebody returned it.
"""

import contextlib
import importlib.metadata
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from athena_backup.catalog import is_marked_deleting
from athena_backup.errors import AbsentError, AthenaError, DamagedError, Fault, FinalError, UnavailableError
from athena_backup.instructions import instructions
from athena_backup.manifest import (
    COMPONENT,
    FAILURE,
    FOLDERS,
    INSTRUCTIONS,
    MANIFEST,
    Component,
    Failure,
    Kind,
    Manifest,
    Server,
    component_folder,
    read_component,
    read_failure,
    read_manifest,
    to_json,
)
from athena_backup.names import SetId, is_attempt, new_attempt
from athena_backup.store import Store, look_at, read_document

_CLOSING = "closing the set"
SETTLE_SECONDS = 60
"""How long an unknown outcome of a put is read after before it is left unknown."""


class OutcomeUnknownError(UnavailableError):
    """A document may or may not have been written, and the store doesn't say; nothing may be removed because of it."""


@dataclass(frozen=True)
class Expected:
    """A component that a set has to have."""

    name: str
    kind: Kind


def software() -> str:
    """Name and version of this program, for documents."""
    return f"athena-backup {importlib.metadata.version('athena-backup')}"


def put_component(store: Store, set_id: SetId, component: Component) -> None:
    """Store a component's document into its attempt's folder."""
    folder = component_folder(set_id, component.kind, component.name, component.attempt)
    put_once(store, folder + COMPONENT, to_json(component))


def put_failed_component(
    store: Store, set_id: SetId, expected: Expected, run_id: str, began: datetime, fault: Fault
) -> None:
    """Store that an attempt at a component failed, and why."""
    component = Component(
        name=expected.name,
        kind=expected.kind,
        attempt=new_attempt(),
        run_id=run_id,
        state="failed",
        began=began,
        ended=datetime.now(UTC),
        fault=fault,
    )
    put_component(store, set_id, component)


def put_once(store: Store, key: str, data: bytes) -> None:
    """Create a document whose bytes nobody else would write; an unknown outcome is settled by reading ("stores", 2).

    Raises `FinalError` if other bytes stand there, `OutcomeUnknownError` if the store doesn't answer in `SETTLE_SECONDS`, or
    refuses for so long to create what it does not have.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    pause_seconds = 0.5
    while True:
        try:
            # False may mean our own bytes: a client that repeats a put whose answer was lost meets its own object.
            if store.put(key, data, if_absent=True) or _stands(store, key, data):
                return
            raise FinalError(f"{key} exists already with other content: another process wrote it")
        except UnavailableError as error:
            if time.monotonic() + pause_seconds > deadline:
                raise OutcomeUnknownError(
                    f"it is unknown whether {key} was written: {error.cause}", step="storing"
                ) from error
            time.sleep(pause_seconds)
            pause_seconds = min(pause_seconds * 2, 8)


def _stands(store: Store, key: str, data: bytes) -> bool:
    """Whether these bytes stand where a put was refused because something stood there."""
    try:
        return read_document(store, key) == data
    except AbsentError:
        # Deleted meanwhile, or S3 refused one of two puts that met (ConditionalRequestConflict) and the other has failed.
        raise UnavailableError(f"the store refuses to create {key}, and has no such object") from None


def attempts(store: Store, set_id: SetId, expected: Expected) -> list[Component]:
    """All attempts at a component that came to an end, oldest first."""
    folder = f"{set_id.prefix}{FOLDERS[expected.kind]}/{expected.name}/"
    found = []
    for attempt in store.folders(folder):
        key = f"{folder}{attempt}/{COMPONENT}"
        if is_attempt(attempt) and store.head(key) is not None:
            component = read_component(read_document(store, key), key)
            if (component.name, component.kind, component.attempt) != (expected.name, expected.kind, attempt):
                raise DamagedError(f"{key} is the document of another component", step=_CLOSING)
            if any(not part.key.startswith(f"{folder}{attempt}/") for part in component.parts):
                raise DamagedError(f"{key} names parts that lie outside of its folder", step=_CLOSING)
            found.append(component)
    return sorted(found, key=lambda component: component.ended)


def complete_attempt(store: Store, set_id: SetId, expected: Expected, run_id: str) -> Component | None:
    """The run's newest complete attempt whose parts all stand in the store with their sizes; None where there is none."""
    for component in reversed(_own_attempts(store, set_id, expected, run_id)):
        if component.state == "complete" and component.parts and not list(_missing_parts(store, component)):
            return component
    return None


def _own_attempts(store: Store, set_id: SetId, expected: Expected, run_id: str) -> list[Component]:
    """Without those of others: two services with one namespace and one store would make one set of both their states."""
    return [component for component in attempts(store, set_id, expected) if component.run_id == run_id]


@contextlib.contextmanager
def _named_step() -> Iterator[None]:
    """A store that fails while the set is closed (full, gone) becomes a status: it has to name this step."""
    try:
        yield
    except AthenaError as error:
        error.step = error.step or _CLOSING
        raise


@_named_step()
def close_set(
    store: Store,
    set_id: SetId,
    expected: Sequence[Expected],
    faults: Iterable[Fault],
    *,
    run_id: str,
    began: datetime,
    only_databases: bool = False,
    cancelled: bool = False,
) -> Manifest | Failure:
    """Write manifest.json if every expected component is complete and no fault is given; failure.json otherwise.

    Only what this run wrote is put together. Its manifest that stands already is returned as it is: it outranks everything.
    Raises the store's errors, `FinalError` if another run's stands there or the set was deleted meanwhile, and
    `OutcomeUnknownError` when nobody can say whether the manifest was written; then nothing else may be.
    """
    standing = _standing_manifest(store, set_id)
    if standing is not None:
        if standing.run_id != run_id:
            raise FinalError(
                f"another run has written the set {set_id} meanwhile",
                next_step="give each service that shares a store an ATHENA_NAMESPACE of its own, then back up again",
            )
        return standing
    chosen, all_faults = _judge(store, set_id, expected, list(faults), run_id)
    if is_marked_deleting(store, set_id):
        all_faults.append(_fault("somebody began to delete the set while it was written"))
    ended = datetime.now(UTC)
    document: dict[str, object] = {
        "namespace": set_id.namespace,
        "timestamp": str(set_id.timestamp),
        "run_id": run_id,
        "software": software(),
        "began": began,
        "ended": ended,
    }
    if not all_faults and not cancelled:
        servers = {component.server.number: component.server for component in chosen if component.server is not None}
        manifest = Manifest.model_validate(
            {
                **document,
                "proved_by": store.proof,
                "only_databases": only_databases,
                "servers": tuple(servers[number] for number in sorted(servers)),
                "components": tuple(chosen),
                "spread_seconds": _spread_seconds(servers.values()),
            }
        )
        store.put(set_id.prefix + INSTRUCTIONS, instructions(manifest).encode())
        put_once(store, set_id.prefix + MANIFEST, to_json(manifest))
        _withdraw_if_deleted(store, set_id, chosen)
        return manifest
    failure = Failure.model_validate({**document, "cancelled": cancelled, "faults": tuple(all_faults)})
    store.put(set_id.prefix + FAILURE, to_json(failure))
    return failure


def _withdraw_if_deleted(store: Store, set_id: SetId, components: Iterable[Component]) -> None:
    """Take back a manifest that stands over nothing: whoever was cut off from the store before the put may have slept for hours.

    A deletion takes the manifest before the rest, so what it began later than this look it finishes by itself.
    """
    documents = [component_folder(set_id, one.kind, one.name, one.attempt) + COMPONENT for one in components]
    try:
        if all(store.head(key) is not None for key in documents) and not is_marked_deleting(store, set_id):
            return
    except UnavailableError:
        return  # the manifest stands, so the set is listed as Success: a run that says otherwise would lie
    store.delete([set_id.prefix + MANIFEST, set_id.prefix + INSTRUCTIONS])
    raise FinalError("somebody deleted the set while it was closed", next_step="back up again")


def _spread_seconds(servers: Collection[Server]) -> float:
    """The time between the first and the last server's instant."""
    instants = [server.consistent_at for server in servers]
    return (max(instants) - min(instants)).total_seconds() if instants else 0.0


def _judge(
    store: Store, set_id: SetId, expected: Sequence[Expected], faults: list[Fault], run_id: str
) -> tuple[list[Component], list[Fault]]:
    """The components that make the set, and everything that keeps it from being one."""
    chosen: list[Component] = []
    named = {fault.component for fault in faults}
    for wanted in expected:
        try:
            complete = complete_attempt(store, set_id, wanted, run_id)
            if complete is not None:
                chosen.append(complete)
            elif wanted.name not in named:
                faults.append(_why_incomplete(store, set_id, wanted, run_id))
        except FinalError as error:
            faults.append(error.fault(component=wanted.name, step=_CLOSING))
    faults += _unequal_cuts(chosen)
    if not expected and not faults:
        faults.append(_fault("no database and no volume is configured", "set ATHENA_DATABASES and ATHENA_VOLUMES"))
    return chosen, faults


def _unequal_cuts(chosen: Sequence[Component]) -> list[Fault]:
    """A fault for every server whose databases were not all read under one cut: a resumed run has new snapshots."""
    servers = [component.server for component in chosen if component.server is not None]
    instants = {
        server.number: {other.consistent_at for other in servers if other.number == server.number} for server in servers
    }
    return [
        _fault(f"the databases of server {number} were read at {len(found)} different instants")
        for number, found in instants.items()
        if len(found) > 1
    ]


def _why_incomplete(store: Store, set_id: SetId, wanted: Expected, run_id: str) -> Fault:
    tried = _own_attempts(store, set_id, wanted, run_id)
    if tried and tried[-1].fault is not None:
        return tried[-1].fault
    if tried:
        missing = ", ".join(_missing_parts(store, tried[-1])) or "every part of it"
        return DamagedError(f"the store lacks {missing}").fault(component=wanted.name, step=_CLOSING)
    return FinalError("it was not backed up: the run ended before").fault(component=wanted.name, step="backing up")


def _missing_parts(store: Store, component: Component) -> Iterable[str]:
    for part, entry in zip(component.parts, look_at(store, [part.key for part in component.parts]), strict=True):
        if entry is None or entry.size_bytes != part.size_bytes:
            yield part.key


def _standing_manifest(store: Store, set_id: SetId) -> Manifest | None:
    key = set_id.prefix + MANIFEST
    return read_manifest(read_document(store, key), key) if store.head(key) is not None else None


def standing_failure(store: Store, set_id: SetId) -> Failure | None:
    """The failure that an earlier run left, if any."""
    key = set_id.prefix + FAILURE
    return read_failure(read_document(store, key), key) if store.head(key) is not None else None


def _fault(cause: str, next_step: str = "") -> Fault:
    return FinalError(cause, next_step=next_step).fault(step=_CLOSING)
