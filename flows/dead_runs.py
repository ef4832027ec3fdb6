"""Runs that nobody works on any more: how they are told from those that live, and how they end.

Whoever holds the slot may treat every other unfinished operation of the namespace as dead (`flows.slot`); so may a service that
starts treat every scheduled run that was due long ago as missed. Copies have a slot and an end of their own (`flows.copies`).
"""

import contextlib
import logging
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed

from athena_backup.backup import close_set, standing_failure
from athena_backup.catalog import SetState, find_set
from athena_backup.errors import AthenaError, FinalError
from athena_backup.store import Store
from flows.runs import (
    BACKUP,
    RECOVER,
    RESTORE,
    SKIPPED,
    OperationRun,
    is_due,
    list_runs,
    operation_run,
    read_runs,
    run_name,
    start_recovery,
)
from flows.slot import claim, release

CLAIM_GRACE = timedelta(seconds=30)
"""How long a run may be Running before it must have the slot: one that a schedule or a button began claims it itself."""
PENDING_LIMIT = timedelta(minutes=2)
"""A run that is Pending for longer has lost the process that was to run it."""
UNCLAIMED_LIMIT = timedelta(minutes=15)
"""The same for one that has no lease and so keeps nobody waiting: a work pool may first have to get a machine and an image."""

logger = logging.getLogger("athena_backup.runs")


def reconcile(
    client: SyncPrefectClient, store: Store, namespace: str, *, lease: UUID | None = None, own: UUID | None = None
) -> int:
    """Bury the namespace's operations that died: close their sets, end their runs. Returns how many there were.

    With ``lease`` the caller holds the slot, and ``own`` is its run; otherwise the slot is claimed for as long as it takes
    if something is unfinished, and nothing happens while somebody else has it. After a dead restore a recovery is started.
    """
    suspects = _suspects(client, namespace, own)
    if not suspects:
        return 0
    claimed = None if lease is not None else claim(client, namespace)
    if lease is None and claimed is None:
        return 0
    try:
        # Looked up again under the slot: a run may have ended, or begun and ended, since.
        dead = _suspects(client, namespace, own)
        for run in dead:
            _bury(client, store, run)
    finally:
        if claimed is not None:
            release(client, claimed)
    # A caller that holds the slot recovers by itself.
    if claimed is not None and any(run.kind != BACKUP for run in dead):
        start_recovery(client, namespace)
    return len(dead)


def _suspects(client: SyncPrefectClient, namespace: str, own: UUID | None) -> list[OperationRun]:
    now = datetime.now(UTC)
    unfinished = [
        run for kind in (BACKUP, RESTORE, RECOVER) for run in list_runs(client, kind, namespace, unfinished=True)
    ]
    return [run for run in unfinished if run.id != own and (_is_abandoned(run, now) or _is_stranded(run, now))]


def _is_abandoned(run: OperationRun, now: datetime) -> bool:
    """A run that works without the slot; a run that began a moment ago may be about to claim it."""
    return run.begun and now - run.state_at > CLAIM_GRACE


def _is_stranded(run: OperationRun, now: datetime) -> bool:
    """A run that a runner took, or whose lease was handed to it, but that never began: its runner died, its time has passed."""
    since = now - max(run.state_at, run.at)
    return since > PENDING_LIMIT if run.lease is not None else run.pending and since > UNCLAIMED_LIMIT


def _bury(client: SyncPrefectClient, store: Store, run: OperationRun) -> None:
    message = "the process or machine that ran it died, or it lost the slot"
    if run.kind == BACKUP:
        close_dead_backup(store, run, message)
    logger.warning("%s is dead: %s", run_name(run.kind, run.set_id), message)
    end_run(client, run.id, Crashed(message=message))


def close_dead_backup(store: Store, run: OperationRun, cause: str, *, cancelled: bool = False) -> None:
    """Close the set of a backup that nobody works on any more, if it is open, and sweep what was half written into the store.

    Where the store does not let that be done, it is logged.
    """
    try:
        entry = find_set(store, run.set_id)
        if entry is not None and entry.state is SetState.UNFINISHED and standing_failure(store, run.set_id) is None:
            fault = FinalError(cause, next_step="the next backup is not affected").fault(step="running the backup")
            close_set(store, run.set_id, [], [fault], run_id=str(run.id), began=run.at, cancelled=cancelled)
        store.sweep(run.set_id.prefix)
    except AthenaError:
        logger.warning(
            "the set %s of a dead run could not be closed or swept: what is left of it stays until it is deleted",
            run.set_id,
            exc_info=True,
        )


def end_run(client: SyncPrefectClient, run: UUID, state: State[Any]) -> None:
    """End a run in a state; one that somebody deleted meanwhile, in Prefect's UI for example, needs none."""
    with contextlib.suppress(ObjectNotFound):
        client.set_flow_run_state(run, state, force=True)


def skip_missed(client: SyncPrefectClient, namespace: str) -> int:
    """End the scheduled runs that nobody was there to begin: one catch-up stands for all of them. Returns how many.

    Without this a runner that comes back would begin every missed run at once, each under a timestamp long past.
    """
    now = datetime.now(UTC)
    before = now - PENDING_LIMIT
    tag = f"namespace:{namespace}"
    ended: set[UUID] = set()
    kept = 0
    # Page by page: of a Prefect server of one's own that went on alone for days there are hundreds.
    while runs := read_runs(client, BACKUP, [tag], unfinished=True, before=before, offset=kept):
        missed = [
            run
            for run in (operation_run(BACKUP, namespace, run) for run in runs if is_due(run, now))
            if run.lease is None and not run.begun and run.id not in ended
        ]
        for run in missed:
            end_run(client, run.id, Cancelled(name=SKIPPED, message="missed: the service was not running"))
        ended |= {run.id for run in missed}
        kept += len(runs) - len(missed)
    return len(ended)
