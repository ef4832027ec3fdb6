"""Copies of sets as Prefect flow runs: starting them, finding them, burying the dead.

A copy does not hold the namespace's slot: it may take hours, and changes neither the set nor what is live, so backups and
restores go on meanwhile. It has a slot of its own, one copy of a namespace at a time, whose lease tells whether it lives;
the runs that wait for their turn wait in Prefect, without a process (the deployment's limit). A set with an unfinished copy
is not deleted: whoever deletes asks `is_being_copied`, which a waiting run answers too.
"""

import logging
from datetime import UTC, datetime
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Crashed

from athena_backup.names import SetId
from flows.dead_runs import CLAIM_GRACE, PENDING_LIMIT, end_run
from flows.requests import CopyRequest
from flows.runs import COPY, OperationRun, create_run, operation_run, read_runs
from flows.slot import claim, copy_slot, ensure_limit, release

logger = logging.getLogger("athena_backup.copies")


def start_copy(client: SyncPrefectClient, namespace: str, request: CopyRequest) -> OperationRun:
    """Create a run of the namespace's ``copy`` deployment; it begins when it is its turn."""
    return create_run(client, COPY, namespace, request.set_id(namespace), None, request)


def copies_of(client: SyncPrefectClient, namespace: str, set_id: SetId) -> dict[str, OperationRun]:
    """The newest copy of the set to each store, by the store's block; waiting ones too."""
    tags = [f"namespace:{namespace}", *_tags(set_id)]
    found = [operation_run(COPY, namespace, run) for run in read_runs(client, COPY, tags, unfinished=False)]
    return {run.to: run for run in reversed(found)}


def read_copy(client: SyncPrefectClient, namespace: str, run: UUID) -> OperationRun:
    """A copy as it stands now."""
    return operation_run(COPY, namespace, client.read_flow_run(run))


def is_being_copied(client: SyncPrefectClient, set_id: SetId) -> bool:
    """Whether a copy reads the set, or waits for its turn to."""
    return bool(read_runs(client, COPY, _tags(set_id), unfinished=True))


def copy_leases(client: SyncPrefectClient, namespace: str) -> frozenset[UUID]:
    """The leases of the namespace's copies at work; those that wait for their turn, any number of them, have none."""
    found = read_runs(client, COPY, [f"namespace:{namespace}"], unfinished=True, begun=True)
    return frozenset(lease for run in found if (lease := operation_run(COPY, namespace, run).lease) is not None)


def bury_dead_copies(
    client: SyncPrefectClient, namespace: str, *, lease: UUID | None = None, own: UUID | None = None
) -> int:
    """End the runs of copies whose process died; returns how many. With ``lease`` the caller has their slot, as run ``own``."""
    if not _dead(client, namespace, own):
        return 0
    ensure_limit(client, copy_slot(namespace))
    claimed = None if lease is not None else claim(client, copy_slot(namespace))
    if lease is None and claimed is None:
        return 0
    try:
        dead = _dead(client, namespace, own)
        for run in dead:
            message = (
                "error copying: the process or machine that ran it died, or it lost its slot (copy again to go on)"
            )
            logger.warning("%s is dead: %s", run.name, message)
            end_run(client, run.id, Crashed(message=message))
    finally:
        if claimed is not None:
            release(client, claimed)
    return len(dead)


def _dead(client: SyncPrefectClient, namespace: str, own: UUID | None) -> list[FlowRun]:
    """Those that are, if nobody has the slot: at work with a lease, or for long on their way to one."""
    now = datetime.now(UTC)
    unfinished = read_runs(client, COPY, [f"namespace:{namespace}"], unfinished=True)
    return [
        run
        for run in unfinished
        if run.id != own
        and run.state is not None
        and run.state_type is not StateType.SCHEDULED
        and now - run.state.timestamp > (CLAIM_GRACE if _has_lease(run) else PENDING_LIMIT)
    ]


def _has_lease(run: FlowRun) -> bool:
    return any(tag.startswith("lease:") for tag in run.tags)


def _tags(set_id: SetId) -> list[str]:
    return [f"source:{set_id.namespace}", f"timestamp:{set_id.timestamp}"]
