"""Operations as Prefect flow runs: starting them, and finding them again (`dead_runs` ends those that nobody works on).

The adapter and the command line both come through here, so that a POST and a button do the same. What a run is to the
outside stands in `OperationRun`; nobody above this module looks at Prefect's own types.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID, uuid4

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from pydantic import BaseModel

from athena_backup.catalog import find_set
from athena_backup.errors import FinalError, PassingError
from athena_backup.names import InvalidNameError, SetId, Timestamp
from athena_backup.store import Store
from flows.requests import BackupRequest, RestoreRequest
from flows.slot import claim, ensure_limit, release

Kind = Literal["backup", "restore", "recover", "copy"]
BACKUP: Kind = "backup"
RESTORE: Kind = "restore"
RECOVER: Kind = "recover"
COPY: Kind = "copy"

SKIPPED = "Skipped"
"""Name of the state in which a scheduled run ends that found the slot taken."""
RECORD_LIMIT = 200
"""Runs that are looked at for one answer: Prefect's own page size."""
_STOPPED = "Runner is shutting down."
"""With what Prefect's runner cancels, at its own end, a run that did not yet listen: nobody cancelled that."""
_DELETED = "set-deleted"
"""Tag of a backup's run whose set was deleted: no record speaks of it any more."""

_WAITING = {StateType.SCHEDULED, StateType.PENDING}
_WORKING = {StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED}


class OperationRunningError(PassingError):
    """A backup or restore of the namespace is running, so no other can begin."""


@dataclass(frozen=True)
class OperationRun:
    """One backup or restore as everybody above sees it."""

    id: UUID
    kind: Kind
    set_id: SetId
    """The set that is written or read; of a restore, its namespace is the source's."""
    begun: bool
    """Whether the flow itself has begun."""
    ended: bool
    outcome: Literal["success", "failed", "cancelled", "skipped"] | None
    message: str
    """The state's message: of a failed run, what failed."""
    at: datetime
    """When it was due."""
    state_at: datetime
    only_databases: bool = False
    skip: tuple[str, ...] = ()
    to: str = ""
    """Of a copy: the block of the store that gets it."""
    lease: UUID | None = None
    deleted: bool = False
    """Of a backup: its set was deleted since."""
    pending: bool = False
    """Whether a runner took it to begin it, and has not yet."""


def start_backup(client: SyncPrefectClient, store: Store, namespace: str, request: BackupRequest) -> OperationRun:
    """Claim the slot and create a run of the namespace's ``backup`` deployment; raises `OperationRunningError`."""
    lease = _claim(client, namespace)
    try:
        timestamp = _free_timestamp(client, store, namespace)
        return create_run(client, BACKUP, namespace, SetId(namespace, timestamp), lease, request)
    except BaseException:
        release(client, lease)
        raise


def start_restore(client: SyncPrefectClient, namespace: str, request: RestoreRequest) -> OperationRun:
    """Claim the own namespace's slot and create a run of its ``restore`` deployment; raises `OperationRunningError`."""
    lease = _claim(client, namespace)
    try:
        return create_run(client, RESTORE, namespace, request.set_id(namespace), lease, request)
    except BaseException:
        release(client, lease)
        raise


def start_recovery(client: SyncPrefectClient, namespace: str) -> OperationRun | None:
    """Claim the slot and create a run of the namespace's ``recover`` deployment.

    None where another operation has the slot: each of them recovers what it works on before anything else.
    """
    try:
        lease = _claim(client, namespace)
    except OperationRunningError:
        return None
    try:
        return create_run(client, RECOVER, namespace, SetId(namespace, Timestamp.of(datetime.now(UTC))), lease)
    except BaseException:
        release(client, lease)
        raise


def _claim(client: SyncPrefectClient, namespace: str) -> UUID:
    ensure_limit(client, namespace)
    lease = claim(client, namespace)
    if lease is None:
        raise OperationRunningError(
            "a backup, restore or recovery is running", next_step="wait for its end, then try again"
        )
    return lease


def _free_timestamp(client: SyncPrefectClient, store: Store, namespace: str) -> Timestamp:
    """The present second, or the next one that no set and no run has: two sets never share a timestamp."""
    for _ in range(10):
        set_id = SetId(namespace, Timestamp.of(datetime.now(UTC)))
        if find_set(store, set_id) is None and not list_runs(
            client, BACKUP, namespace, timestamp=set_id.timestamp, limit=1
        ):
            return set_id.timestamp
        time.sleep(1 - datetime.now(UTC).microsecond / 1e6)
    raise FinalError("no free timestamp was found in ten seconds", next_step="look at the clock of this machine")


def create_run(
    client: SyncPrefectClient,
    kind: Kind,
    namespace: str,
    set_id: SetId,
    lease: UUID | None,
    request: BaseModel | None = None,
) -> OperationRun:
    """Create a run of the namespace's deployment of that kind; raises `FinalError` where there is none."""
    try:
        deployment = client.read_deployment_by_name(f"{kind}/{namespace}")
    except ObjectNotFound:
        raise FinalError(
            f"Prefect has no deployment {kind}/{namespace}",
            next_step="start `athena-backup up`, or deploy prefect.yaml to your work pool",
        ) from None
    run = client.create_flow_run_from_deployment(
        deployment.id,
        name=run_name(kind, set_id),
        tags=run_tags(namespace, set_id, kind, lease),
        parameters={"request": request.model_dump(mode="json")} if request is not None else {},
        # Whose answer is lost is asked for again by Prefect's client: of two runs each would have the lease.
        idempotency_key=str(lease or uuid4()),
    )
    return operation_run(kind, namespace, run)


def run_name(kind: Kind, set_id: SetId) -> str:
    """What a run is called: what it does, and to which set."""
    return f"{kind} {set_id.timestamp}"


def run_tags(namespace: str, set_id: SetId, kind: Kind, lease: UUID | None) -> list[str]:
    """By what a run is found again (design.md, section 6)."""
    tags = [f"namespace:{namespace}", f"timestamp:{set_id.timestamp}"]
    if kind in (RESTORE, COPY):
        tags.append(f"source:{set_id.namespace}")
    if lease is not None:
        tags.append(f"lease:{lease}")
    return tags


def list_runs(
    client: SyncPrefectClient,
    kind: Kind,
    namespace: str,
    *,
    timestamp: Timestamp | None = None,
    unfinished: bool = False,
    limit: int = RECORD_LIMIT,
) -> list[OperationRun]:
    """The namespace's runs of a kind, newest first; a schedule's future runs and skipped ones don't count."""
    tag = f"namespace:{namespace}"
    if timestamp is None:
        found = read_runs(client, kind, [tag], unfinished=unfinished, limit=limit)
    else:
        found = read_runs(client, kind, [tag, f"timestamp:{timestamp}"], unfinished=unfinished, limit=limit)
        # A run that died before it could name itself is known by the instant at which it was due.
        found += read_runs(client, kind, [tag], unfinished=unfinished, limit=limit, due=timestamp.instant)
    now = datetime.now(UTC)
    due = {run.id: operation_run(kind, namespace, run) for run in found if is_due(run, now)}
    return [run for run in due.values() if run.outcome != "skipped" and timestamp in (None, run.set_id.timestamp)]


def read_runs(
    client: SyncPrefectClient,
    kind: Kind,
    tags: list[str],
    *,
    unfinished: bool,
    begun: bool = False,
    limit: int = RECORD_LIMIT,
    due: datetime | None = None,
    before: datetime | None = None,
    offset: int = 0,
) -> list[FlowRun]:
    """Prefect's runs that bear all the tags, newest first, those of the future too; with ``begun`` those at work only.

    With ``due`` those of that second only, with ``before`` those that were due before; the first ``offset`` are passed over.
    """
    states = _WORKING if begun else [*(_WAITING if unfinished else StateType), *_WORKING]
    when = FlowRunFilterExpectedStartTime(after_=due, before_=due + timedelta(seconds=1)) if due else None
    if before is not None:
        when = FlowRunFilterExpectedStartTime(before_=before)
    return client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[kind])),
        flow_run_filter=FlowRunFilter(
            tags=FlowRunFilterTags(all_=tags),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=sorted(set(states)))),
            expected_start_time=when,
        ),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=limit,
        offset=offset,
    )


def is_being_restored(client: SyncPrefectClient, set_id: SetId) -> bool:
    """Whether a restore reads the set, or is about to, into whatever namespace."""
    tags = [f"source:{set_id.namespace}", f"timestamp:{set_id.timestamp}"]
    return bool(read_runs(client, RESTORE, tags, unfinished=True))


def forget_backups(client: SyncPrefectClient, set_id: SetId) -> bool:
    """Let no record speak of a deleted set's ended runs any more; False if there were none."""
    runs = [run for run in list_runs(client, BACKUP, set_id.namespace, timestamp=set_id.timestamp) if run.ended]
    remembered = [run for run in runs if not run.deleted]
    for run in remembered:
        client.update_flow_run(run.id, tags=[*client.read_flow_run(run.id).tags, _DELETED])
    return bool(remembered)


def ongoing_run(
    client: SyncPrefectClient, namespace: str, kinds: Iterable[Kind] = (BACKUP, RESTORE)
) -> OperationRun | None:
    """The backup or restore that is running or about to; None if there is none.

    A scheduled run that waits while another one works counts for itself only once nobody works.
    """
    runs = [run for kind in kinds for run in list_runs(client, kind, namespace, unfinished=True)]
    return min(runs, key=lambda run: (not run.begun, run.lease is None, run.at), default=None)


def finished_components(client: SyncPrefectClient, run: OperationRun) -> set[str]:
    """The names of the components whose last task of the run is done."""
    last_step = "step:backup" if run.kind == BACKUP else "step:switch"
    done = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])),
        task_run_filter=TaskRunFilter(
            state=TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.COMPLETED]))
        ),
        limit=RECORD_LIMIT,
    )
    return {task.name for task in done if last_step in task.tags}


def is_due(run: FlowRun, now: datetime) -> bool:
    """Whether a run's time has come."""
    if run.state_type is not StateType.SCHEDULED:
        return True
    due = run.next_scheduled_start_time or run.expected_start_time
    return due is not None and due <= now


def operation_run(kind: Kind, namespace: str, run: FlowRun) -> OperationRun:
    """What a run of Prefect's is to everybody above."""
    tags = dict(tag.split(":", 1) for tag in run.tags if ":" in tag)
    at = run.expected_start_time or run.created or datetime.now(UTC)
    try:
        timestamp = Timestamp.parse(tags["timestamp"])
    except (KeyError, InvalidNameError):
        timestamp = Timestamp.of(at)
    parameters = run.parameters.get("request") or {}
    parameters = parameters if isinstance(parameters, dict) else {}
    state = run.state_type
    return OperationRun(
        id=run.id,
        kind=kind,
        set_id=SetId(tags.get("source", namespace), timestamp),
        begun=state in _WORKING,
        ended=state not in _WAITING | _WORKING,
        outcome=_outcome(run),
        message=_message(kind, run),
        at=at,
        state_at=run.state.timestamp if run.state else at,
        only_databases=bool(parameters.get("only_databases", False)),
        skip=tuple(parameters.get("skip", ())),
        to=str(parameters.get("to", "")),
        lease=UUID(tags["lease"]) if "lease" in tags else None,
        deleted=_DELETED in run.tags,
        pending=state is StateType.PENDING,
    )


def _outcome(run: FlowRun) -> Literal["success", "failed", "cancelled", "skipped"] | None:
    if run.state_name == SKIPPED:
        return "skipped"
    match run.state_type:
        case StateType.COMPLETED:
            return "success"
        case StateType.FAILED | StateType.CRASHED:
            return "failed"
        case StateType.CANCELLED:
            return "failed" if run.state and run.state.message == _STOPPED else "cancelled"
        case _:
            return None


def was_cancelled_by_somebody(state: State[Any]) -> bool:
    """Whether a run is being cancelled, or was, and not because its runner stops."""
    return state.type in (StateType.CANCELLING, StateType.CANCELLED) and state.message != _STOPPED


def _message(kind: Kind, run: FlowRun) -> str:
    message = (run.state.message if run.state else None) or ""
    if message == _STOPPED:
        return "error starting: the service was stopped before the operation had begun"
    if run.state_type is StateType.CRASHED:
        return f"error running the {kind}: {message.strip() or 'its process died'}"
    return message
