"""Recovery: finish or throw away what a killed restore left in databases and volumes (design.md, section 5).

A switch that had begun is finished, a staging whose switch had not is discarded. It runs as a flow of its own where the
service sees a restore die or finds leftovers at its start, and first thing in every restore; a backup does the same for
each volume that it reads. The slot is held meanwhile, so whatever is found belongs to nobody who lives.
"""

import contextlib
from collections.abc import Collection, Iterable
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.states import Completed, Failed

from athena_backup.errors import AthenaError, Fault, fault_of
from athena_backup.mounts import await_answer
from athena_backup.operation import Operation
from athena_backup.postgres.staging import discard_staging
from athena_backup.settings import load_settings
from athena_backup.volume_archive import Volume
from athena_backup.volume_exchange import leftovers, recover_volume
from athena_backup.volume_staging import half_switched
from flows.components import databases_of, volumes_of
from flows.operating import SlotTakenError, Working, free_slot, operating, run_log, task_threads, was_killed
from flows.runs import RECOVER, SKIPPED, start_recovery


@flow(
    name=RECOVER, task_runner=task_threads(), persist_result=False, on_crashed=[free_slot], on_cancellation=[free_slot]
)
def recover() -> State[Any]:
    """Finish or throw away what a killed restore left. Does no harm where nothing was left."""
    try:
        with operating(RECOVER) as working:
            faults = recover_from_the_dead(working)
    except SlotTakenError:
        return Completed(
            name=SKIPPED, message="skipped: another operation of the namespace is running and recovers first"
        )
    except Exception as error:  # noqa: BLE001 - here the flow ends, and its last state has to say why
        run_log().error("the recovery failed", exc_info=True)
        return Failed(message=str(fault_of(error, step="preparing the recovery")))
    if faults:
        return Failed(message="; ".join(str(fault) for fault in faults))
    return Completed(message="nothing that a killed restore left is in the way")


def recover_from_the_dead(working: Working, skip: Collection[str] = ()) -> list[Fault]:
    """Finish or throw away what killed restores left, in every component; a fault for each volume where that failed.

    Volumes that are skipped are not touched: their mount may be what is broken.
    A side database that can't be dropped takes room and does no harm, so that is only told.
    """
    faults = []
    for volume in (one for one in volumes_of(working.settings) if one.name not in skip):
        try:
            recover_one_volume(volume, working.operation)
        except AthenaError as error:
            faults.append(fault_of(error, component=volume.name, step="recovering from a killed restore"))
    for database in databases_of(working.settings):
        try:
            for name in discard_staging(database):
                run_log().warning("database %s: dropped %s, which a killed restore left", database.name, name)
        except AthenaError as error:
            run_log().warning("database %s: could not look for what killed restores left: %s", database.name, error)
    return faults


def recover_one_volume(volume: Volume, operation: Operation) -> None:
    """Bring one volume wholly to the old or the new state; raises the volume's errors, and like `Operation.check`."""
    await_answer(volume.directory, operation)
    for dead in leftovers(volume.directory):
        finished = recover_volume(volume.directory, dead)
        what = "finished the switch that" if finished else "discarded the staging that"
        run_log().warning("volume %s: %s the killed restore %s left", volume.name, what, dead)


def half_switched_volumes(volumes: Iterable[Volume]) -> list[str]:
    """The names of those volumes that a restore left neither wholly old nor wholly new.

    One that can't be looked at is left out: whoever works on it says what is wrong with it.
    """
    found = []
    for volume in volumes:
        with contextlib.suppress(AthenaError):
            if half_switched(volume.directory):
                found.append(volume.name)
    return found


def recover_after_kill(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook of the runner for a cancelled restore: one that had to be killed is recovered from as one that crashed."""
    if was_killed(flow_run):
        free_slot(flow, flow_run, state)
        recover_after_crash(flow, flow_run, state)


def recover_after_crash(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook of the runner for a crashed restore, whose slot is free by now: start the recovery at once."""
    del flow, flow_run, state
    with get_client(sync_client=True) as client:
        start_recovery(client, load_settings().athena_namespace)
