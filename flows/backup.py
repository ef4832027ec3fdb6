"""The backup: claim the slot, cut the databases, read every component, close the set.

Read `backup` from top to bottom: that is all a backup does. What each step means in bytes is the engine's business.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.futures import PrefectFuture, as_completed, wait
from prefect.states import Cancelled, Completed, Failed

from athena_backup.backup import Expected, close_set, complete_attempt, put_component, put_failed_component
from athena_backup.catalog import find_set
from athena_backup.errors import AthenaError, FinalError, fault_of
from athena_backup.manifest import Manifest
from athena_backup.postgres.cut import Cut, hold_cut
from athena_backup.postgres.dump import write_database, write_globals
from athena_backup.postgres.sessions import Database
from athena_backup.settings import load_settings
from athena_backup.volume_archive import write_volume
from blocks.stores import open_store
from flows.components import database_of, databases_of, omissions, volume_of, volumes_of
from flows.copying import order_copies
from flows.dead_runs import close_dead_backup
from flows.operating import (
    RETRYING,
    SlotTakenError,
    Working,
    component_work,
    free_slot,
    operating,
    run_log,
    task_threads,
    was_killed,
)
from flows.progress import in_units
from flows.recovery import recover_one_volume
from flows.requests import BackupRequest
from flows.runs import BACKUP, SKIPPED, operation_run, was_cancelled_by_somebody

_CLOSING_SECONDS = 10.0
"""How long the slot waits for a dead backup's set to be closed; a service that stops has less than a minute for everything."""


def close_after_crash(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook of the runner for a crashed backup: nobody else closes its set or looks at what it left.

    It has begun before the slot is free, and goes on behind it where the store is slow: in that set nobody else works.
    """
    del flow
    settings = load_settings()
    with get_client(sync_client=True) as client:
        run = operation_run(BACKUP, settings.athena_namespace, client.read_flow_run(flow_run.id))
    cause = "it was told to end, and killed as it did not" if state.is_cancelling() else "its process died"

    def close() -> None:
        try:
            close_dead_backup(open_store(settings), run, cause, cancelled=was_cancelled_by_somebody(state))
        except AthenaError as error:
            run_log().warning("what the dead backup %s left could not be looked for: %s", run.set_id, error)

    closing = threading.Thread(target=close, name="closing", daemon=True)
    closing.start()
    closing.join(_CLOSING_SECONDS)


def close_after_kill(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook of the runner for a cancelled backup: one that had to be killed leaves as much as one that crashed."""
    if was_killed(flow_run):
        close_after_crash(flow, flow_run, state)


@flow(
    name=BACKUP,
    task_runner=task_threads(),
    persist_result=False,
    on_crashed=[close_after_crash, free_slot],
    on_cancellation=[close_after_kill, free_slot],
)
def backup(request: BackupRequest = BackupRequest()) -> State[Any]:  # noqa: B008 - Prefect shows the default in its form
    """Take a full backup of every configured database and volume into the configured store."""
    try:
        with operating(BACKUP) as working:
            databases = databases_of(working.settings)
            volumes = [] if request.only_databases else volumes_of(working.settings)
            expected = [
                *(Expected(one.name, "database") for one in databases),
                *(Expected(one.name, "volume") for one in volumes),
            ]
            refuse_foreign_set(working)
            archiving: list[PrefectFuture[None]] = []
            try:
                with cut_of(databases, working) as cut:
                    reading = {
                        back_up_database.with_options(task_run_name=one.name).submit(one.name): one.name
                        for one in databases
                    }
                    archiving += [
                        back_up_volume.with_options(task_run_name=one.name).submit(one.name) for one in volumes
                    ]
                    for future in as_completed(list(reading)):
                        # Read, or failed for good: DDL that waits for it goes on, and so does vacuum.
                        cut.release(reading[future])
                    write_server_globals(working)
            finally:
                # What the snapshots hold back on the servers goes on while the last volumes are read. Whatever happens, the
                # slot is kept until nobody writes any more.
                wait(archiving)
            outcome = close_set(
                working.store,
                working.set_id,
                expected,
                working.fault_list() or working.why_stopped(),
                run_id=str(working.run_id),
                began=working.began,
                only_databases=request.only_databases,
                cancelled=working.was_cancelled(),
            )
            # While the slot is held, so that nobody deletes the set before its copies are known to be wanted.
            uncopied = order_copies(working) if isinstance(outcome, Manifest) else []
    except SlotTakenError:
        return Completed(name=SKIPPED, message="skipped: another backup or restore of the namespace is running")
    except Exception as error:  # noqa: BLE001 - here the flow ends, and its last state has to say why
        run_log().error("the backup failed", exc_info=True)
        return Failed(message=str(fault_of(error, step="preparing the backup")))
    if isinstance(outcome, Manifest):
        size_bytes = sum(part.size_bytes for component in outcome.components for part in component.parts)
        message = f"{outcome.set_id}: {len(outcome.components)} components, {in_units(size_bytes)} stored"
        return Completed(message="; ".join([message, *omissions(outcome.components), *uncopied]))
    return Cancelled(message=outcome.status) if outcome.cancelled else Failed(message=outcome.status)


@task(name="back up database", tags=["database", "step:backup"], **RETRYING)
def back_up_database(name: str) -> None:
    """Dump one database under the cut that the flow holds."""

    def work(working: Working) -> None:
        if working.cut is None:
            raise FinalError("the flow holds no cut")
        database = database_of(name, working.settings)
        with component_document(working, Expected(name, "database")):
            component = write_database(
                database,
                working.cut,
                working.store,
                working.set_id,
                str(working.run_id),
                working.operation,
                crew=working.crew,
                places=working.places,
                client_directories=working.settings.athena_pg_bin,
            )
            put_component(working.store, working.set_id, component)

    component_work(name, "dumping", work)


@task(name="back up volume", tags=["volume", "step:backup"], **RETRYING)
def back_up_volume(name: str) -> None:
    """Archive one volume, after what a killed restore left half-switched in it was finished.

    A complete archive of an earlier try of this run is kept.
    """

    def work(working: Working) -> None:
        volume = volume_of(name, working.settings)
        recover_one_volume(volume, working.operation)
        if complete_attempt(working.store, working.set_id, Expected(name, "volume"), str(working.run_id)):
            return
        with component_document(working, Expected(name, "volume")):
            component = write_volume(
                volume,
                working.store,
                working.set_id,
                str(working.run_id),
                working.operation,
                crew=working.crew,
                torn_limit=working.settings.athena_torn_limit,
                allow_empty=name in working.settings.athena_empty_volumes,
            )
            put_component(working.store, working.set_id, component)

    component_work(name, "archiving", work)


@contextlib.contextmanager
def cut_of(databases: Sequence[Database], working: Working) -> Iterator[Cut]:
    """Hold the cut over all databases for the length of the block; the tasks have it from ``working``."""
    with hold_cut(
        databases,
        working.operation,
        lock_timeout_seconds=working.settings.athena_lock_timeout_seconds,
        ddl_wait_limit_seconds=working.settings.athena_ddl_wait_seconds,
    ) as cut:
        working.cut = cut
        yield cut


def write_server_globals(working: Working) -> None:
    """Store each server's roles for people to read; no restore needs them, so what fails here is only told."""
    for held in (
        {one.server.number: one for one in working.cut.held.values() if one.server}.values() if working.cut else ()
    ):
        try:
            write_globals(held, working.store, working.set_id, working.operation, working.settings.athena_pg_bin)
        except Exception as error:  # noqa: BLE001 - a backup is whole without them
            is_foreseen = isinstance(error, AthenaError | OSError | MemoryError)
            run_log().warning(
                "the globals of the server of %s are not in the set: %s",
                *(held.database.name, error),
                exc_info=not is_foreseen,
            )


@contextlib.contextmanager
def component_document(working: Working, expected: Expected) -> Iterator[None]:
    """Leave a component.json that says why, where the block fails; the store may be what failed, so none is no new error."""
    began = datetime.now(UTC)
    try:
        yield
    except Exception as error:
        fault = fault_of(error, component=expected.name, step="dumping" if expected.kind == "database" else "archiving")
        with contextlib.suppress(AthenaError):
            put_failed_component(working.store, working.set_id, expected, str(working.run_id), began, fault)
        raise


def refuse_foreign_set(working: Working) -> None:
    """Raise `FinalError` if the timestamp's set was written by another run: two sets never share one."""
    entry = find_set(working.store, working.set_id)
    document = entry and (entry.manifest or entry.failure)
    if document and document.run_id != str(working.run_id):
        raise FinalError(f"there is a set {working.set_id} already", next_step="start another backup")
